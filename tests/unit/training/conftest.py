"""Training problems on the tiny models that know a feature."""

from collections.abc import Callable

import pytest

from hf_gradiend.base_models import objective_of
from hf_gradiend.configuration_gradiend import GradiendConfig
from hf_gradiend.data.collation import prepare_texts
from hf_gradiend.data.neutral import neutral_to_fit
from hf_gradiend.parameters import ParameterSelection, select_parameters
from hf_gradiend.training.arguments import GradiendTrainingArguments
from hf_gradiend.training.solvers import TrainingProblem
from hf_gradiend.training.texts import label_texts


@pytest.fixture
def arguments(tmp_path) -> Callable[..., GradiendTrainingArguments]:
    """Training arguments on the CPU, without bars, that write below the test's own folder."""

    def arguments(**settings: object) -> GradiendTrainingArguments:
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True}
        if settings.get("solver") == "adamw":
            defaults |= {"learning_rate": 3e-3, "max_steps": 20}
        return GradiendTrainingArguments(
            **{**defaults, "per_device_train_batch_size": 16, **settings}
        )

    return arguments


@pytest.fixture
def problem_of(arguments) -> Callable[..., TrainingProblem]:
    """Function of a planted feature and rows of its training texts."""

    def problem_of(
        planted,
        rows: list[int] | None = None,
        selection: ParameterSelection | None = None,
        **settings: object,
    ) -> TrainingProblem:
        data = planted.data["train"] if rows is None else planted.data["train"].select(rows)
        texts = prepare_texts(data, planted.tokenizer, objective_of(planted.model))
        selection = selection or select_parameters(planted.model)
        args = arguments(**settings)
        return TrainingProblem(
            base_model=planted.model,
            selection=selection,
            config=GradiendConfig(
                parameters=selection.to_config(),
                source=args.source,
                target=args.target,
                decoder_initialization=args.decoder_initialization,
            ),
            texts=label_texts(texts, data, ["F", "M"]),
            neutral=neutral_to_fit(None, planted.tokenizer, objective_of(planted.model)),
            pad_token_id=planted.tokenizer.pad_token_id,
            args=args,
        )

    return problem_of
