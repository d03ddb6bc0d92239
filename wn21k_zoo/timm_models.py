"""Our checkpoints as timm models, once this module is imported.

``timm.create_model('wn21k_resnet50.miil_in21k', pretrained=True)``: timm has no plug-ins, so importing this module is
what registers them. Weights come through our verified fetch, also with ``num_classes``, ``in_chans``, ``features_only``
and ``cache_dir``. timm's own names are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model

from wn21k_zoo import registry
from wn21k_zoo.building import SOURCES, build_checkpoint, pretrained_config
from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource
from wn21k_zoo.convert import build
from wn21k_zoo.registry import TIMM_PREFIX

__all__: list[str] = []  # timm's register_model adds to it


def _default_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A configuration with a source, so that timm counts it as pretrained; weights still come through our fetch."""
    source = checkpoint.sources[0]
    place = {"hf_hub_id": source.repo_id} if isinstance(source, HubSource) else {"url": checkpoint.origin}
    return {**pretrained_config(checkpoint), **place}


def _own_config(name: str, config: Any) -> dict[str, Any] | None:
    """A configuration that names a record's weights, as timm or a network has it, without places; None for others."""
    if not config or isinstance(config, str):
        return None
    stated = dict(config if isinstance(config, Mapping) else vars(config))
    known = default_cfgs[f"{TIMM_PREFIX}{name}"].cfgs.get(str(stated.get("tag")))
    if known is None or any(stated.get(key) and stated[key] != getattr(known, key) for key in SOURCES):
        return None
    return {key: value for key, value in stated.items() if value is not None and key not in (*SOURCES, "architecture")}


def _entry_point(name: str) -> Callable[..., Any]:
    """The function that timm calls for ``wn21k_<name>``, with or without a tag."""
    records = registry.records_of(name)
    architecture = records[0].architecture

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> Any:
        if own := _own_config(name, pretrained_cfg):
            pretrained_cfg, pretrained_cfg_overlay = own["tag"], {**own, **(pretrained_cfg_overlay or {})}
        if pretrained_cfg and not isinstance(pretrained_cfg, str):  # from a folder, or the user's own
            return build(
                architecture,
                pretrained=pretrained,
                pretrained_cfg=pretrained_cfg,
                pretrained_cfg_overlay=pretrained_cfg_overlay,
                cache_dir=cache_dir,
                **kwargs,
            )
        checkpoint = registry.get_checkpoint(f"{name}.{pretrained_cfg}") if pretrained_cfg else records[0]
        return build_checkpoint(checkpoint, pretrained, cache_dir=cache_dir, overlay=pretrained_cfg_overlay, **kwargs)

    create.__name__ = create.__qualname__ = f"{TIMM_PREFIX}{name}"
    names = ", ".join(record.name for record in records)
    create.__doc__ = f"{architecture} with the weights of {names}: wn21k info NAME describes each."
    return create


# register_model looks for this name in the module of the function.
default_cfgs = generate_default_cfgs(
    {f"{TIMM_PREFIX}{checkpoint.name}": _default_config(checkpoint) for checkpoint in CHECKPOINTS}
)
for _name in dict.fromkeys(checkpoint.name.partition(".")[0] for checkpoint in CHECKPOINTS):
    globals()[f"{TIMM_PREFIX}{_name}"] = register_model(_entry_point(_name))
