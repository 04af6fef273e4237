"""Parameters in and out of files, shard by shard.

Hugging Face directories (`huggingface`), GGUF files (`gguf_import`) and the
project's own checkpoints. Import the module you need.
"""
