"""Find, learn, read and dial a feature of a language model the Hugging Face way."""

from transformers import AutoConfig, AutoModel

from hf_gradiend.base_models import load_base_model
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.loading import load_feature_dataset, load_neutral_texts
from hf_gradiend.errors import GradiendError
from hf_gradiend.evaluation.decoder import choose_edit
from hf_gradiend.evaluation.encoder import evaluate_encoder
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.trainer import GradiendTrainer

__version__ = "0.1.0"

__all__ = [
    "GradiendConfig",
    "GradiendError",
    "GradiendModel",
    "GradiendTrainer",
    "GradiendTrainingArguments",
    "ParameterSelection",
    "choose_edit",
    "evaluate_encoder",
    "load_base_model",
    "load_feature_dataset",
    "load_neutral_texts",
    "select_parameters",
]

AutoConfig.register("gradiend", GradiendConfig, exist_ok=True)
AutoModel.register(GradiendConfig, GradiendModel, exist_ok=True)
