"""What training and running an adapted network costs beside full fine-tuning: time, memory, files."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory here, and need not speak of itself
