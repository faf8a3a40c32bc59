"""Build libcuda.so.1: a GPU that computes nothing.

    python -m tests.nullgpu.build DIRECTORY

Preloaded, it stands for the CUDA driver, the runtime and cuBLAS. torch's whole CUDA path runs
(dispatch, autograd, allocator, streams, autocast, launches). Every launch, copy, wait and matrix
product is counted; no number is computed. It needs gcc and torch's CUDA wheel.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
CALLERS = (
    "libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so", "libcaffe2_nvrtc.so",
    "libtorch_cuda_linalg.so",
)  # fmt: skip
# torch loads these by name.
LOADED = (
    "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuCtxGetDevice", "cuCtxGetLimit",
    "cuCtxSetLimit", "cuLaunchKernelEx", "cuGetErrorString", "cuGetErrorName",
    "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeIm2col", "cuPointerGetAttributes",
    "cuModuleGetGlobal_v2", "cuFuncSetAttribute",
)  # fmt: skip


def build(directory: Path) -> Path:
    """Build the library in a directory; return its path."""
    packages = Path(sysconfig.get_paths()["purelib"])
    names = set(LOADED)
    for each in CALLERS:
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", packages / "torch/lib" / each], capture_output=True,
            text=True, check=True,
        ).stdout  # fmt: skip
        found = re.finditer(r" U ((?:cuda|__cuda|cublas[A-KM-Z]|cu[A-Z])\w*)", listing)
        names |= {match[1] for match in found}
    names -= {name for name in names if name.startswith(("cuFile", "cusolver", "cusparse"))}
    names.discard("cudaGetDeviceProperties")
    code = (HERE / "special.c").read_text()
    special = set(re.findall(r"^\w[\w \*]*?\b((?:cu|__cuda)\w+)\(", code, re.MULTILINE))
    for name in sorted(names - special):
        code += f'int {name}(void) {{ return plain("{name}"); }}\n'
    (directory / "nullgpu.c").write_text(code)
    library = directory / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library,
         directory / "nullgpu.c", HERE / "props.c", f"-I{packages}/nvidia/cu13/include",
         f"-I{packages}/triton/backends/nvidia/include", "-ldl", "-lpthread"],
        check=True,
    )  # fmt: skip
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
