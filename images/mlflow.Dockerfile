# MLflow's server with PostgreSQL and S3, of the version that the pipeline's steps use.
ARG BASE
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS build
COPY images/mlflow.txt images/sbom.txt /locks/
RUN python3 -m venv /opt/mlflow \
 && /opt/mlflow/bin/pip install --no-cache-dir --no-deps --require-hashes -r /locks/mlflow.txt \
 && python3 -m venv /opt/sbom \
 && /opt/sbom/bin/pip install --no-cache-dir --no-deps --require-hashes -r /locks/sbom.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /sbom.cdx.json /opt/mlflow/bin/python


FROM ${BASE} AS mlflow
RUN dpkg-query --show --showformat '${Package}\t${Version}\t${Architecture}\n' > /debian.tsv \
 && groupadd --gid 10001 mlflow \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlflow
COPY --from=build /opt/mlflow /opt/mlflow
COPY --from=build /sbom.cdx.json /sbom.cdx.json
ENV PATH=/opt/mlflow/bin:$PATH \
    HOME=/tmp \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME ["/tmp"]
WORKDIR /tmp
USER 10001:10001
EXPOSE 5000
CMD ["mlflow", "server", "--host=0.0.0.0", "--port=5000"]
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="yolov8-nas mlflow" \
      org.opencontainers.image.description="MLflow's tracking server for yolov8-nas, with PostgreSQL and S3" \
      org.opencontainers.image.licenses="AGPL-3.0-only" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
