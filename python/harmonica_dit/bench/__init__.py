"""What `harmonica bench` measures: models cached against plain, other caches beside ours, quantized models."""
