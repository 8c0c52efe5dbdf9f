# An NVIDIA machine: docker build -t ditr . && docker run --gpus all -v DATA:/data ditr ditr-cache --help
FROM nvidia/cuda:12.6.3-runtime-ubuntu22.04
RUN apt-get update \
 && apt-get install --yes --no-install-recommends software-properties-common \
 && add-apt-repository --yes ppa:deadsnakes/ppa \
 && apt-get install --yes --no-install-recommends python3.11 python3.11-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home ditr
WORKDIR /opt/ditr
COPY . .
RUN python3.11 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[demo,io,datasets,plot,cu126]'
ENV PATH=/opt/venv/bin:$PATH
USER ditr
WORKDIR /home/ditr
CMD ["ditr-cache", "--help"]
