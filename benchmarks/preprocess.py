"""Wall time and peak memory of one scan, and what the workflow costs beyond its ANTs calls.

    python benchmarks/preprocess.py [--scan FILE] [--repeats N] [--threads N]

Without --scan a phantom head at 1 mm is made. The named baseline is one plain script that makes
the same ANTs calls with the same settings and maps the intensities with the same model, without
Nipype, sidecars or report. Both are timed as whole processes, in turn; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import sys
from pathlib import Path
import nibabel as nb, numpy as np
scan, out, threads, template = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from bids_harmony.imaging.conform import conform
from bids_harmony.imaging.mask import looks_skull_stripped, mask_from_stripped
from bids_harmony.imaging.scale import fit_scale
from bids_harmony.interfaces.ants import ants_session
from bids_harmony.interfaces.ants_functions import (
    divide_by_bias, fit_bias, load, register_rigid, to_ants)
from bids_harmony.interfaces.brain_mask import brain_mask
from bids_harmony.methods.base import Volume
from bids_harmony.methods.bundle import load_bundle
from bids_harmony.workflows.models import choose_bundle
data = conform(Path(scan))
image, affine = data.data, data.affine
with ants_session(threads, 20200220, out) as ants:
    if looks_skull_stripped(image, affine):
        mask = mask_from_stripped(image)
    else:
        mask = brain_mask(ants, image, affine, out)[0] > 0
    corrected = divide_by_bias(image, affine, fit_bias(ants, image, affine, mask))
    fixed = load(template)
    transform = register_rigid(ants, fixed, (corrected, affine), "Rigid", out, mask)
    ants.write_transform(transform, str(out / "rigid.txt"))
    moved = ants.apply_transforms(
        to_ants(ants, *fixed), to_ants(ants, corrected, affine), [str(out / "rigid.txt")])
scale = fit_scale(corrected, mask, "robust")
bundle = load_bundle(choose_bundle(out, method="nyul", model=None, reference=None)[0])
volume = Volume(np.where(mask, scale.apply(corrected), 0).astype("f4"), mask, "T1w")
done = bundle.output_scale["T1w"].invert(bundle.method.harmonize(volume, seed=0).data)
nb.save(nb.Nifti1Image(done, affine), out / "harmonized.nii.gz")
"""


def run(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak memory (GB) of a process and its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command[:3])} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def make_dataset(root: Path, scan: Path | None) -> Path:
    """A BIDS data set of one scan; return the scan."""
    if scan is None:
        from bids_harmony.phantom.dataset import write_phantom

        write_phantom(root, subjects=1, sites=("mprage3",), resolution=1.0)
        return next(root.glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    folder = root / "sub-01" / "anat"
    folder.mkdir(parents=True)
    text = json.dumps({"Name": "benchmark", "BIDSVersion": "1.10.0", "DatasetType": "raw"})
    (root / "dataset_description.json").write_text(text)
    return Path(shutil.copy(scan, folder / "sub-01_T1w.nii.gz"))


def main() -> int:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scan", type=Path, help="a whole-head T1w scan")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        scan = make_dataset(root / "raw", args.scan)
        compare(root, scan, args.repeats, args.threads)
    return 0


def compare(root: Path, scan: Path, repeats: int, threads: int) -> None:
    """Run workflow and plain script in turn."""
    from bids_harmony.bids.write import save_nifti
    from bids_harmony.imaging.templates import template_image

    image = template_image("MNI152NLin2009aSym", 2.0)
    template = save_nifti(image.get_fdata(dtype="float32"), image.affine, root / "template.nii")
    env = {**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": str(threads)}
    times: dict[str, list[tuple[float, float]]] = {"workflow": [], "plain script": []}
    for number in range(repeats):
        out = root / f"out{number}"
        workflow = [
            sys.executable, "-m", "bids_harmony", str(root / "raw"), str(out), "participant",
            "--method", "nyul", "--modality", "T1w", "-w", str(root / f"work{number}"),
            "--nprocs", str(threads), "--omp-nthreads", str(threads), "--no-clean-workdir",
        ]  # fmt: skip
        times["workflow"].append(run(workflow, env))
        plain = root / f"plain{number}"
        plain.mkdir()
        command = [sys.executable, "-c", PLAIN, str(scan), str(plain), str(threads), str(template)]
        times["plain script"].append(run(command, env))
        if number == 0:
            steps(next(out.glob("sub-*/**/anat/*_desc-harmonized_T1w.json")), root / "work0")
    medians = {k: statistics.median(t for t, _ in v) for k, v in times.items()}
    for name, values in times.items():
        memory = max(m for _, m in values)
        spread = ", ".join(f"{t:.1f}" for t, _ in values)
        print(f"{name}: median {medians[name]:.1f} s ({spread}), peak memory {memory:.2f} GB")
    ratio = medians["workflow"] / medians["plain script"]
    print(f"ratio workflow / plain script: {ratio:.3f}")


def steps(sidecar: Path, work: Path) -> None:
    """Duration of each node, from Nipype's own records."""
    from nipype.utils.filemanip import loadpkl

    print(f"{sidecar.name}: seconds per step")
    rows = [
        (float(loadpkl(path).runtime.duration), path.parent.name)
        for path in work.glob("bids_harmony_*_wf/**/result_*.pklz")
    ]
    for seconds, name in sorted(rows, reverse=True):
        print(f"  {name:20s} {seconds:7.2f}")


if __name__ == "__main__":
    sys.exit(main())
