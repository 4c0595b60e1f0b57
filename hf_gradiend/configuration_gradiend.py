"""Configuration of a GRADIEND: what it was learned from, and the layout of its tensors.

Self-contained (transformers only), so that it loads with `trust_remote_code` alone.
"""

from collections.abc import Sequence

from transformers import PretrainedConfig

SIDES = ("factual", "counterfactual", "diff")


class GradiendConfig(PretrainedConfig):
    """Configuration of a `GradiendModel`.

    Args:
        parameters: One entry per base-model parameter, in order: `{"name": str, "shape": list[int],
            "n_selected": int | None}`, where `None` selects every entry and a number says how many
            indices the model's `indices.<name>` buffer holds.
        n_features: Number of encoder neurons.
        feature_classes: For each feature, the pair of class names; the first encodes to +1.
        feature_words: For each class name, the words that stand for it at the slot.
        source: Which gradient the encoder reads: `"factual"`, `"counterfactual"` or `"diff"`.
        target: Which gradient the decoder reproduces; same choices.
        objective: `"masked"` or `"causal"`, how the base model predicts the slot.
        base_model_name_or_path: Hub id or folder of the base model.
        base_model_revision: Commit of the base model, where known.
        base_model_class: Class name of the base model.
        selection_fingerprint: SHA-256 of names, shapes and indices of the selection.
        feature_factor: Feature factor of the chosen edit, in [−1, 1]; `None` before one is chosen.
        step_size: Step size of the chosen edit, in units of weight per unit of gradient.
        decoder_initialization: `"zeros"` (no initial noise in the update, the default) or
            `"uniform"` (the paper's, ±1/√n like the encoder).
        format_version: Version of this layout.
        **kwargs: Forwarded to `transformers.PretrainedConfig`.

    Raises:
        ValueError: If a field has a value that is not allowed.

    References:
        Drechsel and Herbold (2025), https://arxiv.org/abs/2502.01406, section 3.
    """

    model_type = "gradiend"

    def __init__(  # noqa: PLR0913 - one argument per field, as in every transformers configuration
        self,
        *,
        parameters: Sequence[dict] = (),
        n_features: int = 1,
        feature_classes: Sequence[Sequence[str]] | None = None,
        feature_words: dict[str, list[str]] | None = None,
        source: str = "factual",
        target: str = "diff",
        objective: str | None = None,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_class: str | None = None,
        selection_fingerprint: str | None = None,
        feature_factor: float | None = None,
        step_size: float | None = None,
        decoder_initialization: str = "zeros",
        format_version: int = 1,
        **kwargs: object,
    ) -> None:
        # Lists, not dictionaries: config.json has sorted keys, which would permute them.
        self.parameters = [
            {"name": p["name"], "shape": list(p["shape"]), "n_selected": p.get("n_selected")}
            for p in parameters
        ]
        self.n_features = n_features
        self.feature_classes = [list(pair) for pair in feature_classes] if feature_classes else None
        self.feature_words = feature_words
        self.source = source
        self.target = target
        self.objective = objective
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_class = base_model_class
        self.selection_fingerprint = selection_fingerprint
        self.feature_factor = feature_factor
        self.step_size = step_size
        self.decoder_initialization = decoder_initialization
        self.format_version = format_version
        self._check()
        super().__init__(**kwargs)  # pyright: ignore[reportArgumentType] - forwarded as they came

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: object) -> "GradiendConfig":
        """A configuration from the content of config.json.

        Args:
            config_dict: The content.
            **kwargs: Forwarded to `transformers.PretrainedConfig.from_dict`.

        Raises:
            ValueError: If it is the configuration of another kind of model, or not whole.
        """
        found = config_dict.get("model_type", cls.model_type)
        name = config_dict.get("_name_or_path") or "this place"
        if found != cls.model_type:
            raise ValueError(
                f"Expected the configuration of a GRADIEND, but {name} holds a model of type "
                f"{found!r}."
            )
        entries = config_dict.get("parameters")
        whole = isinstance(entries, list) and all(
            isinstance(entry, dict) and {"name", "shape"} <= entry.keys() for entry in entries
        )
        if not whole:
            raise ValueError(
                f"Expected a list of parameters, each with name and shape, in the configuration of "
                f"a GRADIEND, but {name} has {str(entries)[:80]!r}. Is config.json whole?"
            )
        return super().from_dict(config_dict, **kwargs)

    def _check(self) -> None:
        problems: list[str] = []
        for field, allowed in (
            ("source", SIDES),
            ("target", SIDES),
            ("objective", ("masked", "causal", None)),
            ("decoder_initialization", ("zeros", "uniform")),
            ("format_version", (1,)),
        ):
            if getattr(self, field) not in allowed:
                choices = ", ".join(repr(value) for value in allowed)
                problems.append(f"{field} to be one of {choices}, but got {getattr(self, field)!r}")
        if self.n_features < 1:
            problems.append(f"n_features to be at least 1, but got {self.n_features!r}")
        if self.feature_classes is not None and (
            len(self.feature_classes) != self.n_features
            or any(len(pair) != 2 for pair in self.feature_classes)
        ):
            problems.append(
                f"feature_classes to hold one pair of names for each of the {self.n_features} "
                f"features, but got {self.feature_classes!r}"
            )
        if problems:
            raise ValueError(f"GradiendConfig expected {'; and '.join(problems)}.")

    @property
    def n_selected(self) -> int:
        """Number of selected base-model weights, n in the formulas."""
        return sum(
            _product(p["shape"]) if p["n_selected"] is None else p["n_selected"]
            for p in self.parameters
        )


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
