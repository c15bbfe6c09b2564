"""`efficientsam3 zoo`: the variants, their sizes, and their configurations."""

from typing import Annotated, Any

import typer

from . import shared

HELP = """List the variants of the family, or show the configuration of one.

```
efficientsam3 zoo
efficientsam3 zoo efficientsam3-tinyvit-s
efficientsam3 zoo --json | jq '.[].name'
```

A name may end in another text tower (`-mobileclip-s1`), in `-ctx32` or `-ctx77`, and in `-lateral`.
"""


def zoo(
    name: Annotated[
        str | None, typer.Argument(help="Show this variant's configuration.", metavar="[NAME]")
    ] = None,
    as_json: shared.Json = False,
) -> None:
    from .. import zoo as variants

    if name is not None:
        configuration = variants.config(name)
        typer.echo(configuration.to_json_string(use_diff=False) if as_json else str(configuration))
        return
    rows = [sizes(each) for each in variants.names()]
    if as_json:
        shared.print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Millions of parameters")
    table.add_column("name")
    for column in list(rows[0])[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["name"], *(f"{value:.1f}" for value in list(row.values())[1:]))
    Console().print(table)


def sizes(name: str) -> dict[str, Any]:
    """Millions of parameters of a variant's parts; nothing is allocated."""
    import torch

    from ..evaluation.speed import count_parameters
    from ..models.configuration_efficientsam3 import EfficientSam3Config
    from ..models.modeling_efficientsam3 import EfficientSam3Model
    from ..zoo import config

    configuration: EfficientSam3Config = config(name)
    with torch.device("meta"):
        model = EfficientSam3Model(configuration)
    counts = {
        "vision": count_parameters(model.vision_encoder),
        "text": count_parameters(model.text_encoder) + count_parameters(model.text_projection),
        "all": count_parameters(model),
    }
    counts = {
        "vision": counts["vision"],
        "text": counts["text"],
        "heads": counts["all"] - counts["vision"] - counts["text"],
        "all": counts["all"],
    }
    return {"name": name, **{part: count / 1e6 for part, count in counts.items()}}
