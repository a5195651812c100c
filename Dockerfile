# rigfuse on a machine with an NVIDIA GPU: docker build -t rigfuse . && docker run --gpus all -it rigfuse make gpu
# torch's wheels bring the CUDA runtime; the host needs only its driver and the NVIDIA container toolkit.
FROM python:3.12-slim

# Triton compiles its launchers with the system's C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libc6-dev make && rm -rf /var/lib/apt/lists/*

WORKDIR /rigfuse
COPY . .
RUN pip install --no-cache-dir --editable '.[dev]'
