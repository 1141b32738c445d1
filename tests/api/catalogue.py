"""A catalogue as workers publish it, small, for the API's tests."""

from typing import Any

from halfstep.service.store.fleet.components import ComponentInfo


def _params(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


INFOS = (
    ComponentInfo(
        "model",
        "mlp",
        "Fully connected layers.",
        _params(
            hidden={"type": "array", "items": {"$ref": "#/$defs/Width"}, "default": [512]},
            activation={"enum": ["relu", "gelu"], "default": "relu"},
        )
        | {"$defs": {"Width": {"type": "integer", "minimum": 1}}},
    ),
    ComponentInfo("model", "cnn", "Two convolutions.", _params()),
    ComponentInfo("dataset", "digits", "Handwritten digits.", _params(), {"task": "classification"}),
    ComponentInfo("dataset", "house_prices", "Prices.", _params(), {"task": "regression"}),
    ComponentInfo("loss", "cross_entropy", "For classes.", _params()),
    ComponentInfo("loss", "mse", "For numbers.", _params()),
    ComponentInfo(
        "optimizer",
        "adamw",
        "AdamW.",
        _params(
            lr={"type": "number", "exclusiveMinimum": 0, "default": 0.001},
            betas={"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            eps={"anyOf": [{"type": "number"}, {"type": "null"}]},
        ),
    ),
    ComponentInfo(
        "scheduler",
        "step_lr",
        "Multiplies the rate every few epochs.",
        _params(
            ("step_size",),
            step_size={"type": "integer", "minimum": 1},
            gamma={"type": "number", "default": 0.1},
        ),
    ),
)
CATALOGUE = {(info.kind, info.name): info for info in INFOS}
