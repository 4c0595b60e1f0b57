"""Find, learn, read and dial a feature of a language model the Hugging Face way."""

from transformers import AutoConfig, AutoModel

from hf_gradiend.adapter.config import GradiendAdapterConfig
from hf_gradiend.adapter.control import get_strength, set_edit, set_strength, strength
from hf_gradiend.adapter.conversion import GradiendAdapter
from hf_gradiend.adapter.registration import register as _register
from hf_gradiend.base_models import load_base_model
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.building import build_feature_dataset
from hf_gradiend.data.feature_files import save_feature_dataset
from hf_gradiend.data.loading import load_feature_dataset, load_neutral_texts
from hf_gradiend.data.publishing import push_feature_dataset
from hf_gradiend.errors import GradiendError
from hf_gradiend.evaluation.decoder import EditRule, choose_edit
from hf_gradiend.evaluation.encoder import evaluate_encoder
from hf_gradiend.evaluation.features import compare_features
from hf_gradiend.hub import push_debiased_model
from hf_gradiend.modeling_gradiend import GradiendModel
from hf_gradiend.parameters import ParameterSelection, select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.axes import join_axes
from hf_gradiend.training.several_classes import train_contrasts
from hf_gradiend.training.trainer import GradiendTrainer
from hf_gradiend.version import __version__ as __version__

__all__ = [
    "EditRule",
    "GradiendAdapter",
    "GradiendAdapterConfig",
    "GradiendConfig",
    "GradiendError",
    "GradiendModel",
    "GradiendTrainer",
    "GradiendTrainingArguments",
    "ParameterSelection",
    "build_feature_dataset",
    "choose_edit",
    "compare_features",
    "evaluate_encoder",
    "get_strength",
    "join_axes",
    "load_base_model",
    "load_feature_dataset",
    "load_neutral_texts",
    "push_debiased_model",
    "push_feature_dataset",
    "save_feature_dataset",
    "select_parameters",
    "set_edit",
    "set_strength",
    "strength",
    "train_contrasts",
]

AutoConfig.register("gradiend", GradiendConfig, exist_ok=True)
AutoModel.register(GradiendConfig, GradiendModel, exist_ok=True)
_register()
