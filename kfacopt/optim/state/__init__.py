"""What is kept between steps, saved and checked; nothing here knows a hook or a gradient's step."""
