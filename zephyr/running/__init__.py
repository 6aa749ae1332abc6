"""What one run is put together from; zephyr/run.py does it."""
