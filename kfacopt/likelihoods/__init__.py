"""What losses mean at the tensor that they see, one file a family; nothing here knows a model."""

from kfacopt.likelihoods.bernoulli import Bernoulli as Bernoulli
from kfacopt.likelihoods.categorical import CrossEntropy as CrossEntropy
from kfacopt.likelihoods.categorical import NegativeLogLikelihood as NegativeLogLikelihood
from kfacopt.likelihoods.elementwise import Elementwise as Elementwise
from kfacopt.likelihoods.interface import FISHER_TYPES as FISHER_TYPES
from kfacopt.likelihoods.interface import FisherType as FisherType
from kfacopt.likelihoods.interface import Likelihood as Likelihood
from kfacopt.likelihoods.interface import UnsupportedLossError as UnsupportedLossError
from kfacopt.likelihoods.interface import checked as checked
from kfacopt.likelihoods.interface import widened as widened
from kfacopt.likelihoods.recognition import SUPPORTED_LOSSES as SUPPORTED_LOSSES
from kfacopt.likelihoods.recognition import has_likelihood as has_likelihood
from kfacopt.likelihoods.recognition import likelihood_of as likelihood_of
from kfacopt.likelihoods.recognition import with_sum as with_sum
from kfacopt.likelihoods.registry import register_likelihood as register_likelihood
from kfacopt.likelihoods.squared_error import SquaredError as SquaredError
