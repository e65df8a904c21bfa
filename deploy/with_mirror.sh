#!/bin/sh
# Run a command of an image's build with the certificate that the build was given as the secret `ca`, if it was.
# compose.yaml gives an empty one where none is set.
if [ -s /run/secrets/ca.crt ]; then
    export PIP_CERT=/run/secrets/ca.crt SSL_CERT_FILE=/run/secrets/ca.crt
fi
exec "$@"
