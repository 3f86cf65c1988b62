"""Coverage-guided fuzzing of all readers of files, with atheris, which is not a test requirement.

    python -m pip install atheris && python -m tests.campaigns.guided data -max_total_time=120

The kinds are `data` and `checkpoints`. The further words are options of libFuzzer.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import lightning.pytorch  # noqa: F401 - with torch, before the instrumentation, which would take minutes

with atheris.instrument_imports(include=["energy_flow", "zipfile"]):
    from energy_flow.errors import EnergyFlowError
    from tests.campaigns.mutated_files import load_data, load_model
    from tests.campaigns.seeds import data_seeds, model_seeds


def main() -> None:
    warnings.simplefilter("ignore")
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        place, corpus = Path(folder), Path(folder, "corpus")
        corpus.mkdir()
        seeds, load = (data_seeds(), load_data) if kind == "data" else (model_seeds(place), load_model)
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(bytes([number]) + seed.content)

        def once(content: bytes) -> None:
            """Load one file. The first byte selects the seed, and the others are the content."""
            seed = seeds[content[0] % len(seeds)] if content else seeds[0]
            path = place / seed.name
            path.write_bytes(content[1:])
            if seed.name == "pairs.jsonl":
                path.with_suffix(".npz").write_bytes(
                    next(other.content for other in seeds if other.name == "pairs.npz")
                )
            try:
                load(path)
            except EnergyFlowError:
                pass
            finally:
                for left in place.glob("*.*"):
                    left.unlink()

        atheris.Setup([*sys.argv, "-timeout=5", "-rss_limit_mb=2048", str(corpus)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
