"""Files: safetensors a tensor at a time, JSON, and folders that are whole or not there."""
