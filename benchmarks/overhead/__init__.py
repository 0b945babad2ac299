"""Time, memory and files of training and running an adapted network, beside full fine-tuning."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences torch's profiler, which counts memory here
