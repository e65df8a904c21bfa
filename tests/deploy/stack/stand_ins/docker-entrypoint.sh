#!/bin/sh
# What the entry point of the official PostgreSQL image does for compose.yaml; other commands are run as they are.
set -eu
if [ "${1:-}" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    chmod 700 "$PGDATA"
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    initdb --username "$POSTGRES_USER" --pwfile /tmp/password --auth-local trust --auth-host scram-sha-256 \
        $POSTGRES_INITDB_ARGS > /tmp/initdb.log
    rm /tmp/password
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D "$PGDATA" postgres > /dev/null
    printf '%s\n' "listen_addresses = '*'" "unix_socket_directories = '/var/run/postgresql'" \
        >> "$PGDATA/postgresql.conf"
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
fi
exec "$@"
