"""``minigpt export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minigpt_cli.commands.options import OUTPUT, Adapters, Debug, Json, ModelPath, Version, option
from minigpt_cli.core.console import log, print_json
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    from minigpt_cli.huggingface.adapter import LoadedAdapter
    from minigpt_cli.huggingface.base_model import BaseModel

EXAMPLE = "minigpt export runs/tiny exported --dtype bf16"

StoredDtype = Annotated[
    Literal["fp32", "bf16", "fp16"],
    option("--dtype", None, "Number format of the stored weights.", OUTPUT),
]
AdapterOnly = Annotated[
    bool,
    option(
        "--adapter-only", "", "Write the adapter in PEFT's format instead of merging it.", OUTPUT
    ),
]


def export_command(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    adapter: Adapters = None,
    dtype: StoredDtype = "fp32",
    adapter_only: AdapterOnly = False,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Write a Hugging Face directory.

    transformers, if installed, must compute the same logits from it. An adapter is merged.
    """
    nothing_is_saved()
    adapters = adapter or []
    if len(adapters) > 1:
        raise UserError(f"--adapter is given {len(adapters)} times: export takes one adapter")
    if adapter_only and dtype != "fp32":
        raise UserError("--dtype can't be combined with --adapter-only: adapters stay as trained")
    from minigpt_cli.commands.loading import report_base, retry_if_pruned
    from minigpt_cli.huggingface.adapter import open_model

    def export() -> dict[str, Any]:
        base, opened = open_model(model, adapters)
        report_base(base)
        loaded = opened[0] if opened else None
        if not adapter_only:
            return _export_merged(base, loaded, model, out, dtype)
        if loaded is None:
            raise UserError(
                f"{model}: is a whole model without an adapter; leave out --adapter-only"
            )
        return _export_adapter(base, loaded, model, out)

    result = retry_if_pruned([model, *adapters], export)
    if as_json:
        print_json(result)


def _export_merged(
    base: "BaseModel", adapter: "LoadedAdapter | None", model: Path, out: Path, dtype: str
) -> dict[str, Any]:
    from minigpt_cli.huggingface.adapter import merge, origin_of, trained_by_minigpt
    from minigpt_cli.huggingface.card import model_card
    from minigpt_cli.huggingface.export import export_model

    files = {"README.md": model_card(base, model.resolve().name, adapter, alone=False)}
    origin = origin_of(base, adapter) if trained_by_minigpt(base, adapter) else None
    whole = merge(base, adapter) if adapter else base
    exported = export_model(whole, out, dtype, files=files, origin=origin)
    log(f"{exported.path}: {exported.parameters:,} parameters, {exported.check}")
    return {
        "path": str(exported.path),
        "files": exported.files,
        "parameters": exported.parameters,
        "proven": exported.check.difference is not None,
        "max_logit_difference": exported.check.difference,
    }


def _export_adapter(
    base: "BaseModel", adapter: "LoadedAdapter", model: Path, out: Path
) -> dict[str, Any]:
    from minigpt_cli.huggingface.card import model_card
    from minigpt_cli.huggingface.export import export_adapter

    card = model_card(base, model.resolve().name, adapter, alone=True)
    export_adapter(base, adapter, out, files={"README.md": card})
    log(f"{out}: an adapter of rank {adapter.shape.rank}, in PEFT's format")
    return {"path": str(out), "files": sorted(file.name for file in out.iterdir())}
