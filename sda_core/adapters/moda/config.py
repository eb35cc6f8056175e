"""The configuration of a MoDA adapter, saved as ``adapter_config.json``."""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft.config import PeftConfig

from sda_core.errors import ConfigError


class MoDAPeftType(str, enum.Enum):  # noqa: UP042 (as PEFT's own: its text is MoDAPeftType.MODA, a StrEnum's is MODA)
    """The name of the method as an enumeration member, because PEFT reads types as ``PeftType.LORA`` and ``.value``.

    PEFT's own enumeration cannot be extended.  The member equals the plain string and is saved as such.
    """

    MODA = "MODA"


PEFT_TYPE = MoDAPeftType.MODA
_EXPERT_RANKS = ("split", "full")
_VARIANTS = ("paper", "reference")


class GateKind(NamedTuple):
    """Properties of a kind of gate."""

    is_learned: bool
    depends_on_modality: bool


GATES = {
    "modality": GateKind(is_learned=True, depends_on_modality=True),
    "onehot": GateKind(is_learned=False, depends_on_modality=True),
    "uniform": GateKind(is_learned=False, depends_on_modality=False),
}
"""The kinds of gates by name; their formulas are in ``gates.py``."""


def _default_modalities() -> list[str]:
    return ["image", "text"]


@dataclass
class MoDAConfig(PeftConfig):
    """Modality-disentangled adaptation: LoRA split into experts, mixed by a gate that depends on the modality.

    Args:
        r: LoRA rank.  With ``expert_rank="split"`` it is the total over the experts (each has ``r / num_experts``);
            with ``"full"`` every expert has rank ``r``.
        lora_alpha: numerator of the scale ``lora_alpha / r``.
        use_rslora: the scale is ``lora_alpha / sqrt(r)`` instead (rank-stabilised LoRA, arXiv 2312.03732).
        lora_dropout: dropout on the adapter's input while training.
        variant: ``"paper"``, all experts share one dropout mask, as one LoRA does; ``"reference"``, each expert draws its own
            mask, as the paper's public code does (in training that costs a matmul per expert).  Both have the same
            parameters, and the same outputs without dropout.
        num_experts: E; one expert is plain LoRA.
        expert_rank: ``"split"`` or ``"full"``, see ``r``.
        gate: ``"modality"``, a learned softmax over the experts for each modality; ``"onehot"``, each modality owns
            ``num_experts / len(modalities)`` experts outright (independent LoRAs); ``"uniform"``, ``1 / num_experts``
            for every modality.
        modalities: their names, in the order of the ids that :class:`~sda_core.adapters.modality` takes.
        modality_dim: width of the modality embeddings of the learned gate.
        target_modules: a list of name suffixes, or one regular expression that must match a module's full name.
        exclude_modules: modules to exclude, in the same form.
        plain_modules: targeted modules that get one plain LoRA of rank ``r`` without a gate, in the same form (the public
            code does this to the layers of the vision tower).
        modules_to_save: name suffixes of modules that are trained in full and saved with the adapter.

    Raises:
        ConfigError: a value is out of range, or values do not fit each other.
    """

    r: int = 8
    lora_alpha: float = 32
    use_rslora: bool = False
    lora_dropout: float = 0.1
    variant: str = "paper"
    num_experts: int = 4
    expert_rank: str = "split"
    gate: str = "modality"
    modalities: list[str] = field(default_factory=_default_modalities)
    modality_dim: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    plain_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # pyright: ignore[reportAttributeAccessIssue]
        self.target_modules = _names(self.target_modules)
        self.exclude_modules = _names(self.exclude_modules)
        self.plain_modules = _names(self.plain_modules)
        self.modalities = list(self.modalities)
        for name in ("r", "num_experts", "modality_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MoDAConfig.{name}", f"should be at least 1 (got {getattr(self, name)})")
        if self.lora_alpha <= 0:
            raise ConfigError("MoDAConfig.lora_alpha", f"should be positive (got {self.lora_alpha})")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError("MoDAConfig.lora_dropout", f"should be at least 0 and below 1 (got {self.lora_dropout})")
        if self.gate not in GATES:
            raise ConfigError("MoDAConfig.gate", f"should be one of {', '.join(GATES)} (got {self.gate!r})")
        if self.expert_rank not in _EXPERT_RANKS:
            raise ConfigError("MoDAConfig.expert_rank", f"should be one of {', '.join(_EXPERT_RANKS)} (got {self.expert_rank!r})")
        if self.variant not in _VARIANTS:
            raise ConfigError("MoDAConfig.variant", f"should be one of {', '.join(_VARIANTS)} (got {self.variant!r})")
        if isinstance(self.modules_to_save, str):
            raise ConfigError("MoDAConfig.modules_to_save", f"should be a list of names (got {self.modules_to_save!r})")
        for name in ("target_modules", "exclude_modules", "plain_modules"):
            self._check_pattern(name)
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ConfigError("MoDAConfig.modalities", f"should be a list of different names (got {self.modalities})")
        if self.expert_rank == "split" and self.r % self.num_experts:
            raise ConfigError(
                "MoDAConfig.r",
                f"{self.r} cannot be split among {self.num_experts} experts",
                "make r a multiple of num_experts, or set expert_rank='full'",
            )
        if self.gate == "onehot" and self.num_experts % len(self.modalities):
            raise ConfigError(
                "MoDAConfig.num_experts",
                f"{self.num_experts} experts cannot be divided equally among the modalities {', '.join(self.modalities)}",
                "with gate='onehot' make num_experts a multiple of their number",
            )

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"MoDAConfig.{name}", f"{pattern!r} is not a regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """The factor of the sum over the experts."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def for_module(self, name: str) -> MoDAConfig:
        """The configuration for one module: this one, or plain LoRA for a module in ``plain_modules``."""
        plain = self.plain_modules
        if isinstance(plain, str):
            matches = re.fullmatch(plain, name) is not None
        else:
            matches = any(name == suffix or name.endswith(f".{suffix}") for suffix in plain or [])
        if not matches:
            return self
        config = copy.copy(self)
        config.num_experts, config.gate = 1, "uniform"
        return config

    @property
    def rank_per_expert(self) -> int:
        """LoRA rank of one expert."""
        return self.r // self.num_experts if self.expert_rank == "split" else self.r

    @property
    def depends_on_modality(self) -> bool:
        """Whether the output depends on the modality; with one expert or a uniform gate it does not."""
        return self.num_experts > 1 and GATES[self.gate].depends_on_modality

    @property
    def gate_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the gate's parameters in a layer, by name; empty if the gate is not learned or there is one expert."""
        if self.num_experts == 1 or not GATES[self.gate].is_learned:
            return {}
        return {"moda_embedding": (len(self.modalities), self.modality_dim), "moda_gate": (self.num_experts, self.modality_dim)}

    @property
    def is_prompt_learning(self) -> bool:
        """Always False; part of PEFT's interface."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; sets become sorted lists, so that the saved file does not depend on hash order."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


def _names(value: Iterable[str] | str | None) -> list[str] | str | None:
    return value if value is None or isinstance(value, str) else sorted(value)
