#!/usr/bin/env bash
# Start-up script of a Chunkmill worker on a GCP spot VM: L4 (g2-standard-*) or A100 (a2-highgpu-*).
#
#   spot-gcp.sh [--dry-run | --help]
#
# GCP runs it as root at each boot. A further run changes only what is not as it should be. --dry-run (or DRY_RUN=1)
# says what it would do and changes nothing. A service account reads the secret, which is never in this script, in
# metadata or in a command's argument.
#
# Settings come from the environment, or from instance metadata of the same name (CHUNKMILL_WHEEL: chunkmill-wheel):
#   CHUNKMILL_SECRET   secret in Secret Manager, lines as in chunkmill.env.example. Default: chunkmill-env
#   CHUNKMILL_WHEEL    required: gs://bucket/chunkmill-VERSION-py3-none-any.whl, https://... or a path
#   CHUNKMILL_VERSION  instead of a wheel: a version on PIP_INDEX_URL, which must be your own index
#   CHUNKMILL_WHEEL_SHA256   required: the wheel's digest, which `make wheel` prints
#   CHUNKMILL_DEVICE   cuda (default) or cpu
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL   pip's own: your index
#   PIP_CONSTRAINT     versions of dependencies to take, without digests, instead of those that the wheel was tested with
#   MIN_DRIVER (580), DRIVER_WAIT (600 s), PYTHON, DESTDIR (a folder to write below)
#
# Run once for the project:
#   gcloud iam service-accounts create chunkmill-worker
#   gcloud secrets create chunkmill-env --data-file=chunkmill.env
#   gcloud secrets add-iam-policy-binding chunkmill-env --role=roles/secretmanager.secretAccessor \
#       --member=serviceAccount:chunkmill-worker@PROJECT.iam.gserviceaccount.com
#   gcloud storage buckets add-iam-policy-binding gs://BUCKET --role=roles/storage.objectViewer \
#       --member=serviceAccount:chunkmill-worker@PROJECT.iam.gserviceaccount.com
#
# This creates one machine with an L4 (an A100 needs --machine-type=a2-highgpu-1g). The notice of 120 s needs gcloud 586
# or later (`gcloud beta compute` before). Without it the shutdown itself is the notice, 30 s at best. Ubuntu 24.04 has
# Python 3.12; `gcloud compute images list --project=deeplearning-platform-release` names later images.
#   gcloud compute instances create chunkmill-1 --zone=us-central1-a \
#       --machine-type=g2-standard-8 --provisioning-model=SPOT --instance-termination-action=DELETE \
#       --preemption-notice-duration=120s --maintenance-policy=TERMINATE \
#       --image-family=common-cu129-ubuntu-2404-nvidia-580 --image-project=deeplearning-platform-release \
#       --boot-disk-size=100GB --boot-disk-type=pd-balanced \
#       --service-account=chunkmill-worker@PROJECT.iam.gserviceaccount.com --scopes=cloud-platform \
#       --metadata=install-nvidia-driver=True,chunkmill-wheel=gs://BUCKET/chunkmill-0.1.0-py3-none-any.whl,chunkmill-wheel-sha256=DIGEST \
#       --metadata-from-file=startup-script=deploy/spot-gcp.sh
#
# For a fleet that replaces lost machines, `gcloud compute instance-templates create chunkmill-l4` takes the same options
# without --zone. A managed instance group replaces every machine that was taken away, in any zone with capacity:
#   gcloud compute instance-groups managed create chunkmill-l4 --template=chunkmill-l4 --size=4 \
#       --region=us-central1 --zones=us-central1-a,us-central1-b --target-distribution-shape=any

set -euo pipefail

# --- The same lines are in spot-gcp.sh, spot-aws.sh and plain.sh, because each must be one file. A test compares them.

VENV=/opt/chunkmill # a link to one of the folders below
RELEASES=/opt/chunkmill-releases
ENV_FILE=/etc/chunkmill/chunkmill.env
UNITS=/etc/systemd/system
SERVICES=()
CHANGED=0
release='' # the folder to switch to
unfinished=''

say() { printf 'chunkmill: %s\n' "$*"; }

die() {
    printf 'chunkmill: %s\n' "$*" >&2
    exit 1
}

# run COMMAND...: runs it; with --dry-run only prints it. No argument may be a secret: process lists show arguments.
run() {
    if [[ $DRY_RUN == 1 ]]; then say "would run: $*"; else "$@"; fi
}

# put MODE PATH: writes standard input to the file, whole or not at all, and only if the content differs.
put() {
    local mode=$1 path=$DESTDIR$2 new
    if [[ $DRY_RUN == 1 ]]; then
        say "would write: $path, mode $mode"
        return
    fi
    mkdir -p "${path%/*}"
    new=$(mktemp "$path.XXXXXX")
    cat > "$new"
    chmod "$mode" "$new"
    if cmp -s "$new" "$path"; then
        rm -f "$new"
        chmod "$mode" "$path"
    else
        mv -f "$new" "$path"
        CHANGED=1
    fi
}

# The machine's image contains the driver. Without it a worker would compute on the CPU, at the price of a GPU.
check_driver() {
    [[ $CHUNKMILL_DEVICE == cuda ]] || return 0
    if [[ $DRY_RUN == 1 ]]; then
        say "would check: nvidia-smi finds a GPU, and a driver of version $MIN_DRIVER or later"
        return
    fi
    local left=$DRIVER_WAIT versions
    until versions=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null) && [[ $versions ]]; do
        if (( left <= 0 )); then
            die "nvidia-smi finds no GPU (waited $DRIVER_WAIT s): take an image with NVIDIA's driver, or set" \
                "CHUNKMILL_DEVICE=cpu"
        fi
        sleep 5 # images that install the driver do so while they boot
        left=$((left - 5))
    done
    if (( ${versions%%.*} < MIN_DRIVER )); then
        die "the driver is ${versions%%$'\n'*}, and torch for CUDA 13 needs $MIN_DRIVER or later: take a newer image," \
            "or set MIN_DRIVER if your index has another torch"
    fi
    say "driver ${versions%%$'\n'*}, GPUs: $(wc -l <<< "$versions")"
}

find_python() {
    local each
    for each in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if "$each" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$each"
            return
        fi
    done
    return 1
}

# has FOLDER STAMP: whether the folder holds this installation, complete and in working order.
has() {
    [[ -f $1/.installed-from && $(< "$1/.installed-from") == "$2" ]] && "$1/bin/chunkmill" --version &> /dev/null
}

check_digest() {
    sha256sum --check --status <<< "$CHUNKMILL_WHEEL_SHA256  $1" ||
        die "${1##*/} has another digest than CHUNKMILL_WHEEL_SHA256: $(sha256sum < "$1")"
}

# install_locked EXTRAS: what the wheel's requirements.lock lists for them, each file by its digest and nothing else. On
# a machine without a GPU a build of torch for the CPU is taken, if pip finds one whose digest is known.
install_locked() {
    local lock=("$release/bin/python" "$scratch/wheel/chunkmill/system/locked.py") build
    local by_digest=("${pip[@]}" install --quiet --require-hashes --no-deps --only-binary :all: --requirement)
    "${lock[@]}" "$1" > "$scratch/requirements.txt"
    "${by_digest[@]}" "$scratch/requirements.txt"
    for build in cpu cuda; do
        [[ $build != cpu || $CHUNKMILL_DEVICE == cpu ]] || continue
        "${lock[@]}" --torch "$build" "$1" > "$scratch/torch.txt"
        [[ -s $scratch/torch.txt ]] || return 0
        if "${by_digest[@]}" "$scratch/torch.txt"; then return; fi
    done
    die "torch could not be installed"
}

# Installs into a folder of its own. The services go on with the one they have until switch_release, so if anything
# fails before that, nothing has changed for them.
install_package() {
    local source=${CHUNKMILL_WHEEL:-${CHUNKMILL_VERSION:+chunkmill==$CHUNKMILL_VERSION}}
    local releases=$DESTDIR$RELEASES stamp each python wheel
    [[ $source ]] || die "set CHUNKMILL_WHEEL and CHUNKMILL_WHEEL_SHA256; \`make wheel\` in a checkout prints both"
    [[ $source != chunkmill==* || ${PIP_INDEX_URL:-} ]] ||
        die "CHUNKMILL_VERSION needs PIP_INDEX_URL, your own index: on a public one anybody may own the name chunkmill"
    [[ ${CHUNKMILL_WHEEL_SHA256:-} =~ ^[0-9a-f]{64}$ ]] ||
        die "set CHUNKMILL_WHEEL_SHA256 to the digest of the wheel: \`make wheel\` and \`sha256sum FILE\` print it"
    stamp="${source}[$CHUNKMILL_EXTRAS] $CHUNKMILL_WHEEL_SHA256"
    umask 022 # the service's user reads what root installs
    if [[ $DRY_RUN != 1 ]]; then
        mkdir -p "$releases"
        exec 9> "$releases/.lock"
        flock --nonblock 9 || die "this script is already running: wait until it is done"
    fi
    for each in "$DESTDIR$VENV" "$releases"/*; do
        if has "$each" "$stamp"; then
            release=$(readlink -f "$each")
            say "$source is installed in $release"
            return
        fi
        # What a run left behind that was killed.
        [[ ! -d $each || -f $each/.installed-from || $each != "$releases"/* ]] || run rm -rf "$each"
    done
    if ! python=$(find_python); then
        command -v apt-get > /dev/null || die "no Python 3.11 or later with venv is here: install one, or set PYTHON"
        run apt-get -o DPkg::Lock::Timeout=300 update --quiet
        run env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install --yes --quiet python3-venv
        python=$(find_python) || [[ $DRY_RUN == 1 ]] ||
            die "this system's Python is older than 3.11: install a later one, and name it with PYTHON=/path/to/python3"
    fi
    release=$releases/$(date -u +%Y%m%d-%H%M%S-%3N)
    unfinished=$release
    run "${python:-python3}" -m venv "$release"
    local pip=("$release/bin/python" -m pip --disable-pip-version-check)
    case $source in
        gs://* | s3://*) run fetch_object "$source" "$scratch/${source##*/}" ;;
        *) run "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$scratch" "$source" ;;
    esac
    wheel=$(echo "$scratch"/*.whl)
    run check_digest "$wheel"
    if [[ ${PIP_CONSTRAINT:-} ]]; then
        run "${pip[@]}" install --quiet "${wheel}[$CHUNKMILL_EXTRAS]"
    else
        run "$release/bin/python" -m zipfile -e "$wheel" "$scratch/wheel"
        run install_locked "$CHUNKMILL_EXTRAS"
        run "${pip[@]}" install --quiet --no-deps "$wheel"
    fi
    run "$release/bin/chunkmill" --version
    [[ $DRY_RUN == 1 ]] || printf '%s\n' "$stamp" > "$release/.installed-from"
    unfinished=''
}

# Switches the link in one step. The release before it stays, so that going back to it is a matter of seconds.
switch_release() {
    local link=$DESTDIR$VENV before each
    before=$(readlink -f "$link") || true
    [[ $before != "$release" ]] || return 0
    CHANGED=1
    if [[ -d $link && ! -L $link ]]; then # the layout of earlier versions of this script
        before=$DESTDIR$RELEASES/first
        run mv -T "$link" "$before"
    fi
    run ln -sfn "${release#"$DESTDIR/opt/"}" "$link.new"
    run mv -fT "$link.new" "$link"
    for each in "$DESTDIR$RELEASES"/*; do
        [[ ! -d $each || $each -ef $release || $each -ef $before ]] || run rm -rf "$each"
    done
}

# install_environment FILE: puts settings and secrets where only root can read them; systemd gives them to the service.
install_environment() {
    local name
    if [[ $DRY_RUN == 1 ]]; then
        put 0600 "$ENV_FILE" < /dev/null
        return
    fi
    for name in DATABASE_URL REDIS_URL; do
        grep "^$name=." "$1" | grep -qv ':PASSWORD@' ||
            die "the environment has no $name; see chunkmill.env.example"
    done
    if ! grep -q '^EMBEDDING_DEVICE=' "$1"; then
        # Not auto: a worker that finds no GPU must say so, not use the CPU. The last line may lack a newline.
        printf '\nEMBEDDING_DEVICE=%s\n' "$CHUNKMILL_DEVICE" >> "$1"
    fi
    put 0600 "$ENV_FILE" < "$1"
}

install_worker() {
    SERVICES+=(chunkmill-worker.service)
    put 0644 "$UNITS/chunkmill-worker.service" << 'UNIT'
[Unit]
Description=Chunkmill embedding workers of this machine
Wants=network-online.target
After=network-online.target time-sync.target nvidia-persistenced.service
StartLimitIntervalSec=0

[Service]
Type=exec
User=chunkmill
Group=chunkmill
EnvironmentFile=/etc/chunkmill/chunkmill.env
Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID
Environment=HOME=/var/lib/chunkmill HF_HUB_DISABLE_TELEMETRY=1
WorkingDirectory=/var/lib/chunkmill
StateDirectory=chunkmill
ExecStart=/opt/chunkmill/bin/chunkmill worker

KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=20
Restart=on-failure
RestartSec=60
OOMPolicy=continue

LimitNOFILE=65536
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes
CapabilityBoundingSet=
LimitCORE=0
UMask=0077
PrivateTmp=yes
ProtectProc=invisible
ProtectHostname=yes
ProtectKernelLogs=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
ReadWritePaths=-/run/lock

[Install]
WantedBy=multi-user.target
UNIT
}

start_services() {
    switch_release
    if ! getent passwd chunkmill > /dev/null; then
        run useradd --system --user-group --no-create-home --home-dir /var/lib/chunkmill --shell /usr/sbin/nologin \
            chunkmill
    fi
    run systemctl daemon-reload
    run systemctl enable "${SERVICES[@]}"
    # --no-block, because at boot this script may itself be a job that systemd waits for. Others of our units that run
    # here, such as chunkmill-openai, must not stay on a release that will be deleted.
    [[ $CHANGED == 0 ]] || run systemctl --no-block try-restart 'chunkmill-*.service'
    run systemctl --no-block start "${SERVICES[@]}"
    [[ $DRY_RUN == 1 ]] || say "done. Follow it: journalctl -f -u 'chunkmill-*'"
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

case ${1:-} in
    "") ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help)
        usage
        exit
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
DRY_RUN=${DRY_RUN:-0}
DESTDIR=${DESTDIR:-}
DRIVER_WAIT=${DRIVER_WAIT:-600}
MIN_DRIVER=${MIN_DRIVER:-580}
if [[ $DRY_RUN != 1 && -z $DESTDIR && $EUID != 0 ]]; then
    die "it installs a service, so it must be root; --dry-run says what it would do"
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" ${unfinished:+"$unfinished"}' EXIT

# --- End of the lines that are the same. -----------------------------------------------------------------------------

# gcp attribute NAME | gcp secret NAME | gcp object gs://BUCKET/OBJECT: prints it. It is in Python so that the
# service account's token stays inside one process and out of arguments that `ps` shows.
gcp() {
    python3 - "$@" << 'PY'
import base64, json, os, sys, time, urllib.error, urllib.parse, urllib.request

METADATA = os.environ.get("METADATA_URL", "http://metadata.google.internal/computeMetadata/v1")
SECRETS = os.environ.get("SECRET_MANAGER_URL", "https://secretmanager.googleapis.com/v1")
STORAGE = os.environ.get("STORAGE_URL", "https://storage.googleapis.com/storage/v1")

def get(url, **headers):
    request = urllib.request.Request(url, headers={k.replace("_", "-"): v for k, v in headers.items()})
    for left in (4, 3, 2, 1, 0):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except OSError as error:  # HTTPError too
            if left == 0 or getattr(error, "code", 500) < 500:
                raise
            time.sleep(3)

def metadata(path):
    return get(f"{METADATA}/{path}", Metadata_Flavor="Google").decode()

def authorized(url):
    token = json.loads(metadata("instance/service-accounts/default/token"))["access_token"]
    return get(url, Authorization=f"Bearer {token}")

what, name = sys.argv[1:]
try:
    if what == "attribute":
        found = metadata(f"instance/attributes/{name}").encode()
    elif what == "secret":
        path = name if "/" in name else f"projects/{metadata('project/project-id')}/secrets/{name}"
        found = base64.b64decode(json.loads(authorized(f"{SECRETS}/{path}/versions/latest:access"))["payload"]["data"])
    else:
        bucket, _, path = name.removeprefix("gs://").partition("/")
        found = authorized(f"{STORAGE}/b/{bucket}/o/{urllib.parse.quote(path, safe='')}?alt=media")
except OSError as error:
    if what == "attribute" and getattr(error, "code", None) == 404:
        sys.exit()
    sys.exit(f"chunkmill: {what} {name} cannot be read: {error}")
sys.stdout.buffer.write(found)
PY
}

fetch_object() { gcp object "$1" > "$2"; }

# setting NAME: reads it from the environment, else from the instance's metadata; leaves it unset if neither has it.
setting() {
    local attribute=${1,,} value
    [[ $DRY_RUN != 1 && -z ${!1:-} ]] || return 0
    value=$(gcp attribute "${attribute//_/-}")
    [[ -z $value ]] || export "$1=$value"
}

for name in CHUNKMILL_{SECRET,WHEEL,WHEEL_SHA256,VERSION,DEVICE} PIP_{INDEX_URL,EXTRA_INDEX_URL,CONSTRAINT}; do setting "$name"; done
CHUNKMILL_SECRET=${CHUNKMILL_SECRET:-chunkmill-env}
CHUNKMILL_DEVICE=${CHUNKMILL_DEVICE:-cuda}
CHUNKMILL_EXTRAS=${CHUNKMILL_EXTRAS:-worker}

install_package
check_driver
if [[ $DRY_RUN == 1 ]]; then
    say "would read: secret $CHUNKMILL_SECRET from Secret Manager"
else
    gcp secret "$CHUNKMILL_SECRET" > "$scratch/environment"
fi
install_environment "$scratch/environment"
install_worker
start_services
