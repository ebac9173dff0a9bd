# For machines with NVIDIA GPUs and their Container Toolkit: torch's wheels bring CUDA, the host brings the driver.
#
#   docker build -t takd .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data:/takd/data" -v "$PWD/runs:/takd/runs" takd \
#     train.py --student resnet20 --cuda 1
#
# --shm-size: through it the processes that make --augment rotate-crop-flip hand over their images.
FROM python:3.12-slim

# A C compiler for takd/cpu/kernels.c, which a run on a CPU compiles when it starts.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /takd
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

ENTRYPOINT ["python3"]
CMD ["train.py", "--help"]
