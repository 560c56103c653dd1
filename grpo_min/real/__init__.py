"""Models that others have trained: in (load), our own class for them (llama), out (export).

`safetensors`, `gguf`, `jinja2` and `huggingface_hub` are needed only where they are used.
"""
