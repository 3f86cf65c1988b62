"""Encode own text pairs as training data: python -m energy_flow.encode input=pairs.jsonl output=pairs.safetensors"""

import functools
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from energy_flow.data.text.encoder import TextEncoder
from energy_flow.data.text.encoding import PartialResult, assemble, check_output, encode_rest
from energy_flow.data.text.pairs import TextPairs, read_texts
from energy_flow.runs.application import application
from energy_flow.runs.settings import find_device
from energy_flow.settings import ProgramSettings, read
from energy_flow.tables import print_text


class EncodeSettings(ProgramSettings):
    """The whole config of an encoding."""

    input: str
    output: str
    source_key: str
    target_key: str
    encoder: str
    dtype: Literal["int8", "float16", "float32"]
    batch_size: Annotated[int, Field(ge=1)]
    save_every: Annotated[int, Field(ge=1)]
    device: Literal["auto", "cpu", "cuda"]


def encode(config: dict[str, Any]) -> None:
    """Encode a file of text pairs into a file of embeddings."""
    settings = read(EncodeSettings, config, "")
    console, device = Console(), find_device(settings.device)
    say = functools.partial(print_text, console)
    given, output = (Path(path).expanduser().absolute() for path in (settings.input, settings.output))
    texts = read_texts(given, settings.source_key, settings.target_key)
    check_output(output, given, texts)
    encoder = TextEncoder(settings.encoder, str(device))
    identity = {
        "texts": texts.digest(),
        "rows": len(texts),
        "encoder": encoder.name,
        "dimension": encoder.dim,
        "dtype": settings.dtype,
    }
    partial = PartialResult(output, identity)
    say(f"{len(texts):,} pairs of {given}; encoder {encoder.name}, dimension {encoder.dim}, on {device}")
    if cut := encoder.num_cut([*texts.source, *texts.target]):
        say(f"{cut:,} of {2 * len(texts):,} texts are longer than this encoder reads: their ends are ignored")
    if done := partial.num_rows():
        say(f"continuing after {done:,} rows in {partial.folder}")
    try:
        _run(settings, texts, encoder, partial, console)
    except KeyboardInterrupt:
        saved = f"{partial.num_rows():,} of {len(texts):,} rows are saved"
        print(f"{saved}; repeat the command to continue", file=sys.stderr)
        raise
    metadata = {
        "encoder": encoder.name,
        "normalized": "true",
        "source": settings.source_key,
        "target": settings.target_key,
        "text": given.name,
    }
    lowest = assemble(partial, output, texts, encoder, metadata)
    say(
        f"checked: {len(texts):,} pairs with names, all rows finite and of length 1; a sample encoded again has "
        f"cosines of at least {lowest:.5f}"
    )
    say(f"written: {output}; data=files data.train={settings.output} trains with it")


def _run(
    settings: EncodeSettings, texts: TextPairs, encoder: TextEncoder, partial: PartialResult, console: Console
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("encoding texts", total=2 * len(texts), completed=2 * partial.num_rows())
        encode_rest(
            texts,
            encoder,
            partial,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            part_size=settings.batch_size * settings.save_every,
            advance=lambda count: progress.advance(task, count),
        )


main = application("encode")(encode)

if __name__ == "__main__":
    main()
