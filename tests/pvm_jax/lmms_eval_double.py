"""A double of lmms-eval, for machines without it: the few names of it that the adapter uses."""

from dataclasses import dataclass
from types import ModuleType


def double() -> dict[str, ModuleType]:
    """lmms_eval.api.model.lmms and lmms_eval.models.registry_v2.ModelManifest as they are in
    0.7.3."""
    names = (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    )
    modules = {name: ModuleType(name) for name in names}

    class Lmms:
        is_simple = True

        def __init__(self):
            self.task_dict = {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    return modules
