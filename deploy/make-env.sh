#!/bin/sh
# Makes .env for docker-compose.yml from env.example, with a new random password for each user. If .env is there, it
# keeps what is in it and adds only what is missing, so run it again after an upgrade.
#
#   deploy/make-env.sh [FILE]      default: .env in the checkout
set -eu
umask 077

folder=$(cd "$(dirname "$0")" && pwd)
file=${1:-$folder/../.env}
new=$(mktemp "$file.XXXXXX")
trap 'rm -f "$new"' EXIT
if [ -f "$file" ]; then
    cat "$file" > "$new"
    echo >> "$new" # the last line may lack its end
else
    cat "$folder/env.example" > "$new"
fi

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$folder/env.example" | while read -r name; do
    if grep -q "^$name=." "$new"; then continue; fi
    case $name in
        COMPOSE_PROFILES) value=$(sed -n 's/^COMPOSE_PROFILES=//p' "$folder/env.example") ;;
        FLOWER_BASIC_AUTH) value=chunkmill:$(random) ;;
        *) value=$(random) ;;
    esac
    grep -q "^$name=$" "$new" || echo "$name=" >> "$new"
    # sed reads the value from its standard input, so that it is in no process list.
    filled=$(echo "s/^$name=\$/$name=$value/" | sed -f - "$new")
    printf '%s\n' "$filled" > "$new"
    echo "added $name"
done
mv -f "$new" "$file"
echo "wrote $file: look at COMPOSE_PROFILES in it, then run docker compose up -d"
