"""Parameters in and out of files, shard by shard.

Hugging Face directories (`huggingface`, `huggingface_export`), GGUF files
(`gguf_import`) and the project's own checkpoints (`manager`). Import the module
you need.
"""
