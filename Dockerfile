# kdexp as a container:
#   docker build -t kdexp .
#   docker run --rm -v kdexp-runs:/kdexp/mlruns kdexp sweep sweeps/digits.yaml
#   docker run --rm --network host -v kdexp-runs:/kdexp/mlruns kdexp ui
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --create-home --uid 1000 kdexp \
    && install -d -o kdexp -g kdexp /kdexp /kdexp/mlruns /kdexp/data

# The dependencies first: gigabytes that change only with these two files.
WORKDIR /opt/kdexp
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir kdexp \
    && touch README.md kdexp/__init__.py \
    && pip install -c constraints.txt '.[export,postgresql]'

COPY kdexp kdexp
RUN pip install --no-deps --force-reinstall .

USER kdexp
WORKDIR /kdexp
COPY --chown=kdexp:kdexp kdexp/sweeps sweeps
VOLUME ["/kdexp/mlruns", "/kdexp/data"]
ENTRYPOINT ["kdexp"]
CMD ["--help"]
