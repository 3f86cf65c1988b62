"""Write a trained model for inference without energy_flow: python -m energy_flow.export output=model.onnx"""

import copy
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.export import ExportedProgram

from energy_flow.atomic import atomic_writer
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.rollout import RolloutSettings
from energy_flow.errors import ConfigError, ExportError, brief
from energy_flow.predict import load_model
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.runs.application import application
from energy_flow.settings import ProgramSettings, read
from energy_flow.tables import print_text

_SUFFIXES = (".onnx", ".pt2")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra [export]
_LARGEST_ONNX = 2**31 - 2**20  # bytes of weights: protobuf allows 2 GiB for the whole file

_TRACED_BATCH = 3
_CHECKED_BATCHES = (1, 17)
# A file may sum in another order than the model, so entries may differ by some hundred float32 roundings (6e-8) of the
# largest entry. Rounding can also flip a decision of a flow, such as the step in which it reaches a plane. So each row
# may differ as much as its output moves when the entries of the row move by about eight roundings.
_TOLERANCE = 2e-5
_SOURCE_MOVES, _NUM_MOVES = 5e-7, 8
_LARGEST_MOVE = 1e-2  # share of the largest entry; with more, a comparison says nothing

Run = Callable[[Tensor], Tensor]


class ExportSettings(ProgramSettings):
    """The whole config of an export."""

    ckpt_path: str | None
    output: str
    opset: Annotated[int, Field(ge=18)] | None


def export(config: dict[str, Any]) -> None:
    """Write a model as .onnx or .pt2, and check the file."""
    settings = read(ExportSettings, config, "")
    path = Path(settings.output).expanduser().absolute()
    _check_output(path, settings.opset)
    model = load_model(settings.ckpt_path)
    difference = export_model(model, path, opset=settings.opset)
    console, dim = Console(), model.card.dim
    batches = " and ".join(map(str, _CHECKED_BATCHES))
    print_text(
        console,
        f"checked: the file and the model agree on batches of {batches} rows; the largest difference is "
        f"{difference:.1e} of the largest entry",
    )
    prepared = ", normalised in the file" if model.card.normalize else ""
    print_text(console, f"input: source, float32 [batch, {dim}]{prepared}; output: embedding, float32 [batch, {dim}]")
    print_text(console, f"written: {path}, {path.stat().st_size / 1e6:,.1f} MB")


def export_model(model: EnergyFlowModel | FlowProcessor, path: str | Path, *, opset: int | None = None) -> float:
    """Write a model as one file that runs without energy_flow, and compare the file with the model.

    The file takes `source`, float32 [B, D], for any B, and gives `embedding`, float32 [B, D]. It prepares the rows as
    `EnergyFlowModel` does, but it checks nothing: the output of a bad row is NaN. It computes on the CPU.

    Args:
        model: in evaluation mode.
        path: ends in .onnx, or in .pt2 for `torch.export.load`. The file must not exist.
        opset: version of the ONNX operators, at least 18; None: the exporter chooses.

    Returns:
        The largest difference between outputs of the file and of the model, as a share of a row's largest entry.

    Raises:
        ConfigError: the model is in training mode, the path can't be written, `opset` doesn't fit, or a package of the
            extra [export] is missing.
        ExportError: the model can't be traced or translated, or the file computes other numbers. No file is left.
    """
    path = Path(path).expanduser()
    _check_output(path, opset)
    if any(part.training for part in model.modules()):
        raise ConfigError("the model is in training mode. Call model.eval() before the export")
    inference = Inference(model)
    if path.suffix == ".onnx":
        _check_size(inference, path)
    with torch.no_grad(), _quiet():
        program = _traced(inference)
        content = _onnx_file(program, opset) if path.suffix == ".onnx" else _pt2_file(program)
        try:
            with atomic_writer(path) as file:
                file.write(content)
                file.flush()
                return _check_file(Path(file.name), path, inference)
        except OSError as error:
            raise ConfigError(f"output = {path}: can't be written ({error.strerror}). Give another path") from error


class Inference(nn.Module):
    """A model as a function of tensors alone: a copy on the CPU, in float32, without checks on the host.

    Args:
        model: stays as it is.
    """

    def __init__(self, model: EnergyFlowModel | FlowProcessor) -> None:
        super().__init__()
        processor = model if isinstance(model, FlowProcessor) else model.processor
        self.normalize = isinstance(model, EnergyFlowModel) and model.card.normalize
        self.processor: FlowProcessor = copy.deepcopy(processor).to("cpu", torch.float32)
        self.processor.requires_grad_(False)
        self.processor.rollout_settings = RolloutSettings.automatic().model_copy(
            update={"engine": "autograd", "chunk": None}
        )

    def forward(self, source: Tensor) -> Tensor:
        """Source embeddings [B, D] -> output embeddings [B, D]; NaN for a sample without a landing."""
        if self.normalize:
            exact = source.double()  # as in `EnergyFlowModel`
            source = (exact / exact.norm(dim=1, keepdim=True)).to(source.dtype)
        output = self.processor(source)
        embedding: Tensor = output.embedding
        return embedding.masked_fill(output.faults.no_landing[:, None], torch.nan)


def _check_output(path: Path, opset: int | None) -> None:
    """Check that the file can be written, without overwriting another.

    Raises:
        ConfigError: wrong suffix, an existing file, a folder that is missing or not writable, or missing packages.
    """
    where = f"output = {path}"
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{where}: must end in .onnx or .pt2")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{where}: its folder is missing or not writable. Create it, or give another")
    if path.exists():
        raise ConfigError(f"{where}: already exists. Remove it, or give another name")
    if path.suffix == ".pt2" and opset is not None:
        raise ConfigError(f"opset = {opset}: a .pt2 file has no ONNX operators. Set opset=null, or output=....onnx")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ConfigError(
            f"{where}: needs {' and '.join(missing)}, which the extra [export] installs: "
            f"python -m pip install {' '.join(missing)}. Or write a .pt2 file"
        )


def _check_size(inference: Inference, path: Path) -> None:
    size = sum(value.nbytes for value in inference.state_dict().values())
    if size > _LARGEST_ONNX:
        raise ConfigError(
            f"output = {path}: the weights have {size / 2**30:.1f} GiB, and an ONNX file holds 2. Write a .pt2 file"
        )


def _traced(inference: Inference) -> ExportedProgram:
    """The operations of a forward pass, for any batch size.

    Raises:
        ExportError: a part does more than compute with tensors.
    """
    batch = {"source": {0: torch.export.Dim.DYNAMIC}}
    source = torch.randn(_TRACED_BATCH, inference.processor.dim)
    inference(source)  # its errors are in our words
    try:
        return torch.export.export(inference, (source,), dynamic_shapes=batch, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export can't trace the model: {_reason(error)}. Its parts must compute with tensors alone: no "
            "Python numbers or choices that depend on values, and sizes from tensor.shape, not from len(tensor)"
        ) from error


def _onnx_file(program: ExportedProgram, opset: int | None) -> bytes:
    """Translate a program to ONNX.

    Raises:
        ExportError: ONNX has no such operation, or not in this version.
    """
    try:
        program = program.run_decompositions({torch.ops.aten.searchsorted.Tensor: _searchsorted})
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            verbose=False,
            input_names=["source"],
            output_names=["embedding"],
        )
        assert translated is not None
        proto = translated.model_proto
    except Exception as error:
        raise ExportError(
            f"the model can't be translated to ONNX: {_reason(error)}. Write a .pt2 file, or update onnx and onnxscript"
        ) from error
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if opset is not None and versions[""] != opset:
        raise ExportError(f"opset = {opset}: the installed exporter can't write it. Set opset={versions['']}, or null")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto.SerializeToString()


def _searchsorted(ordered: Tensor, values: Tensor, *, right: bool = False, **other: Any) -> Any:
    """`torch.searchsorted` by counting, which ONNX can express."""
    if not right or other:
        return NotImplemented
    return (ordered[..., None, :] <= values[..., None]).sum(-1)


def _pt2_file(program: ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _check_file(written: Path, path: Path, inference: Inference) -> float:
    """Run a file on batches of other sizes than the traced one, and compare its outputs with the model's.

    Args:
        written: the file under its temporary name.
        path: its name later.
        inference: the model.

    Returns:
        The largest difference, as a share of a row's largest entry.

    Raises:
        ExportError: they differ by more than rounding, or rounding alone changes the outputs of most rows.
    """
    run = _onnx_runner(written) if path.suffix == ".onnx" else _pt2_runner(written)
    source = _check_rows(inference.processor.dim)
    expected, moves = inference(source), _moves(inference, source)
    scale = expected.abs().amax(1)
    if (moves <= _LARGEST_MOVE * scale).float().mean() <= 0.5:
        raise ExportError(
            f"output = {path}: can't be checked, because the model's own outputs are NaN, or change by more than "
            f"{_LARGEST_MOVE:.0%} when sources change by {_SOURCE_MOVES}. Train the model first. No file is left"
        )
    found = torch.cat([run(rows) for rows in source.split(_CHECKED_BATCHES)])
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = (found - expected).masked_fill(same, 0.0).abs().amax(1)
    wrong = ~(difference <= _TOLERANCE * scale + moves)
    if wrong.any():
        share = (difference / scale)[wrong].max().item()
        raise ExportError(
            f"output = {path}: the file computes other numbers than the model in {wrong.sum().item()} of "
            f"{len(source)} rows; the largest difference is {share:.2g} of a row's largest entry, and rounding "
            f"explains {_TOLERANCE:.0e}. No file is left. Write the other format, or update torch, onnx and onnxruntime"
        )
    return (difference / scale).nan_to_num(nan=0.0).max().item()


def _check_rows(dim: int) -> Tensor:
    """Random rows [N, D] for the check: of length 1, and with entries about 1."""
    rows = torch.randn(sum(_CHECKED_BATCHES), dim, generator=torch.Generator().manual_seed(1))
    rows[::2] = nn.functional.normalize(rows[::2])
    return rows


def _moves(inference: Inference, source: Tensor) -> Tensor:
    """The largest change of each output row [N] when the entries of its source change by `_SOURCE_MOVES`."""
    generator, expected = torch.Generator().manual_seed(2), inference(source)
    moved = (
        inference(source * (1 + _SOURCE_MOVES * torch.randn(source.shape, generator=generator)))
        for _ in range(_NUM_MOVES)
    )
    return torch.stack([(output - expected).abs().amax(1) for output in moved]).amax(0)


def _onnx_runner(path: Path) -> Run:
    import onnxruntime  # an optional package

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda source: torch.from_numpy(session.run(["embedding"], {"source": source.numpy()})[0])


def _pt2_runner(path: Path) -> Run:
    with path.open("rb") as file:
        run: Run = torch.export.load(io.BytesIO(file.read())).module()
    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide notes of the exporters to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the first cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return brief(f"{type(error).__name__}: {lines[0]}".rstrip(".: "))


main = application("export")(export)

if __name__ == "__main__":
    main()
