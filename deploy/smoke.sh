#!/usr/bin/env bash
# Tries the containers for real, with nothing but Docker: builds them, runs a small federation from nothing to its model,
# stops a client and kills the server on the way, and tries whoever must be refused.
#
#   deploy/smoke.sh                      about five minutes on two idle cores, once pip has its packages
#   MASKDM_WHEELS=DIR deploy/smoke.sh    takes wheels from a folder first, e.g. a build of torch for CPUs
#   TORCH_INDEX=URL deploy/smoke.sh      or looks for that build in a package index
#
# One line for each check; ends with OK (exit 0) or FAILED (exit 1). Uses a Compose project and a folder of its own, and
# removes both; what remains is Docker's build cache.
set -euo pipefail
cd "$(dirname "$0")/.."

wheels=${MASKDM_WHEELS:-}
unset "${!MASKDM_@}" "${!COMPOSE_@}" 2>/dev/null || true
work=$(mktemp -d)
project=maskdm-smoke-$$
server=$project-server-1
user=$(id -u)
[[ $user != 0 ]] || user=12345 # root is what the containers must not be
rounds=6
export COMPOSE_PROJECT_NAME=$project MASKDM_UID=$user MASKDM_GID=$user MASKDM_FEDERATION=$work/federation
export MASKDM_IMAGE_SIZE=16 MASKDM_DRAWN=400 MASKDM_IMAGES=4K MASKDM_LOCAL_IMAGES=256 MASKDM_ROUNDS=$rounds
failures=0

# A .env file of the user's does not count here.
compose() { docker compose --env-file /dev/null "$@"; }

passed() { printf 'ok      %s\n' "$1"; }

failed() {
  printf 'FAILED  %s\n' "$1"
  failures=$((failures + 1))
}

# check WHAT COMMAND…: the command succeeds.
check() {
  local what=$1
  shift
  if "$@" >"$work/output" 2>&1; then passed "$what"; else
    failed "$what"
    tail -n 5 "$work/output" | sed 's/^/        /'
  fi
}

# must WHAT COMMAND…: as check, and without it there is no point in going on.
must() {
  local before=$failures
  check "$@"
  ((failures == before)) || exit 1
}

not() { ! "$@"; }

# until_true SECONDS COMMAND…
until_true() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.5
  done
}

# Removes all of it, and says how it ended.
finish() {
  local code=$?
  if ((code || failures)); then
    for service in prior provision server hospital-a hospital-b hospital-c; do
      printf -- '-- the last lines of %s\n' "$service"
      docker logs --tail 8 "$project-$service-1" 2>&1 | sed 's/^/        /' || true
    done
  fi
  docker ps -aq --filter "name=^$project-" | xargs -r docker rm --force --volumes >/dev/null 2>&1 || true
  compose down --volumes --remove-orphans --timeout 1 >/dev/null 2>&1 || true
  docker volume ls -q --filter "name=^$project-" | xargs -r docker volume rm >/dev/null 2>&1 || true
  docker image rm --force "$project-server" "$project-client" "$project-wheels" >/dev/null 2>&1 || true
  rm -rf "$work"
  if ((code || failures)); then
    printf 'FAILED: %s checks, after %s s\n' "$failures" "$SECONDS"
    exit 1
  fi
  printf 'OK, after %s s\n' "$SECONDS"
}
trap finish EXIT

state() { docker inspect --format '{{.State.Status}}' "$1"; }
is_healthy() { [[ $(docker inspect --format '{{.State.Health.Status}}' "$1") == healthy ]]; }
has_ended_well() { [[ $(docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$1") == 'exited 0' ]]; }
has_said() { docker logs "$1" 2>&1 | grep --quiet -- "$2"; }
times_said() { docker logs "$1" 2>&1 | grep --count -- "$2" || true; }
lines() { if [[ -e $1 ]]; then wc -l <"$1"; else echo 0; fi; }
rounds_done() { (($(lines "$work/federation/rounds.jsonl") >= $1)); }
said_more_often() { (($(times_said "$1" "$2") > $3)); }

echo "-- images"
if [[ -n $wheels ]]; then
  printf 'FROM scratch\nCOPY *.whl /\n' | docker build --quiet --tag "$project-wheels" --file - "$wheels" >/dev/null
  export WHEELS=$project-wheels
fi
must "both images are built" compose build --quiet
torch=$(docker run --rm --entrypoint python "$project-client" -c 'import torch; print(torch.__version__, torch.version.cuda or "for CPUs")')
for target in server client; do
  bytes=$(docker image inspect --format '{{.Size}}' "$project-$target")
  printf '        maskdm-%s: %s MB, with torch %s\n' "$target" $((bytes / 1000000)) "$torch"
done
if [[ $torch == *'for CPUs' ]]; then
  check "the client's image is at most 1.5 GB" test "$bytes" -le 1500000000
fi
layers() { docker image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" | grep . | head -n -1; }
check "the two share all layers but the last" test "$(layers "$project-server")" = "$(layers "$project-client")"
check "no compiler is in the image" docker run --rm --entrypoint sh "$project-client" -c \
  '! command -v cc && ! command -v gcc && ! command -v g++ && ! command -v clang && ! command -v ld'

echo "-- docker compose up --build"
must "everything comes up: images, prior, kits, server, three hospitals" compose up --build --detach --quiet-pull
must "the server's health check, GET /health over TLS, is content" is_healthy "$server"
must "the hospitals are healthy: connected, and ready to train" until_true 120 eval \
  "is_healthy $project-hospital-a-1 && is_healthy $project-hospital-b-1 && is_healthy $project-hospital-c-1"

restricted='{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.Privileged}} {{.HostConfig.Init}} {{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}} {{.Config.User}}'
for service in images prior provision server hospital-a hospital-b hospital-c; do
  check "$service: read-only root, no privileges, no capabilities, init, not root" test \
    "$(docker inspect --format "$restricted" "$project-$service-1")" = "true false true [ALL] [] $user:$user"
done
check "the one service that runs as root may change owners, has no network, and has ended" test \
  "$(docker inspect --format '{{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}} {{.HostConfig.NetworkMode}} {{.State.Status}}' "$project-folders-1")" = \
  "[ALL] [CHOWN] none exited"
for service in server hospital-a; do
  check "$service: its process is user $user, and can write its state but not the image" docker exec "$project-$service-1" \
    sh -c "[ \$(id -u) = $user ] && touch /data/.tried && rm /data/.tried && ! touch /opt/maskdm/tried && ! touch /tried"
done
check "a hospital sees its own kit, and neither another's nor the authority's key" docker exec "$project-hospital-a-1" \
  sh -c '[ "$(ls /kit)" = kit.zip ] && [ -z "$(ls /kits)" ] && [ -z "$(find / -name ca.key 2>/dev/null)" ]'
check "the server sees its own key, and neither a kit nor the authority's key" docker exec "$server" \
  sh -c '[ -f /kits/server/server.key ] && [ -z "$(find / -name "*.zip" -path "/kit*" 2>/dev/null)" ] && [ -z "$(find / -name ca.key 2>/dev/null)" ]'

echo "-- what a hospital's network reaches"
sibling=$(docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$project-hospital-b-1")
# Prints one word for an attempt to connect; "refused" comes from a host that is there.
connect='import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4).close()
    print("connected")
except ConnectionRefusedError:
    print("refused")
except socket.gaierror:
    print("unknown")
except OSError:
    print("unreachable")'
from_a() { docker exec "$project-hospital-a-1" python -c "$connect" "$@"; }
check "the server" test "$(from_a server 8000)" = connected
check "not hospital-b by name" test "$(from_a hospital-b 8000)" = unknown
check "not hospital-b by address" test "$(from_a "$sibling" 8000)" = unreachable
check "   (which is there, for the server)" test "$(docker exec "$server" python -c "$connect" "$sibling" 8000)" = refused
check "nothing outside" test "$(from_a 192.0.2.1 443)" = unreachable
for network in hospital-a hospital-b hospital-c; do
  check "   (the network of $network is internal)" test \
    "$(docker network inspect --format '{{.Internal}}' "${project}_$network")" = true
done
ask='import ssl, sys, urllib.error, urllib.request, zipfile
context = ssl.create_default_context(cadata=zipfile.ZipFile("/kit/kit.zip").read("ca.crt").decode())
request = urllib.request.Request(f"https://server:8000{sys.argv[2]}", data=b"" if sys.argv[1] == "POST" else None)
try:
    print(urllib.request.urlopen(request, context=context, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)'
answer() { docker exec "$project-hospital-a-1" python -c "$ask" "$@"; }
check "/health of the server answers 200" test "$(answer GET /health)" = 200
for path in /v1/control/start-run /v1/control/list-runs /v1/control/register-node /v1/runtime/acquire-task; do
  check "POST $path at the public port answers 404" test "$(answer POST "$path")" = 404
done
check "   (unlike what nodes use, which answers $(answer POST /v1/fleet/pull-messages))" eval \
  '[[ $(answer POST /v1/fleet/pull-messages) == [45]?? && $(answer POST /v1/fleet/pull-messages) != 404 ]]'

echo "-- one client stopped and started, the server killed"
must "a round is done" until_true 180 rounds_done 1
check "hospital-b stops within its time, by itself" compose stop --timeout 20 hospital-b
check "   (it was not killed)" test "$(docker inspect --format '{{.State.ExitCode}}' "$project-hospital-b-1")" = 130
joined=$(times_said "$project-hospital-b-1" 'joined server:8000')
docker start "$project-hospital-b-1" >/dev/null
check "started again, it joins" until_true 120 said_more_often "$project-hospital-b-1" 'joined server:8000' "$joined"
before=$(lines "$work/federation/rounds.jsonl")
docker kill "$server" >/dev/null
check "the server is killed in the middle, after $before rounds" eval "((before < rounds)) && [[ \$(state $server) == exited ]]"
docker start "$server" >/dev/null
check "started again, it continues from its journal" until_true 120 has_said "$server" "[1-9][0-9]* rounds done before"
for service in server hospital-a hospital-b hospital-c; do
  must "$service ends by itself, with exit code 0" until_true 420 has_ended_well "$project-$service-1"
done
check "federation/rounds.jsonl has $rounds rounds" test "$(lines "$work/federation/rounds.jsonl")" = "$rounds"
check "federation/model.safetensors is there, and user $user's" test \
  "$(stat --format %u "$work/federation/model.safetensors")" = "$user"
for service in server hospital-a; do
  check "the audit log of $service is whole" compose run --rm --no-deps --no-TTY "$service" audit-log verify
done

echo "-- who is refused"
export MASKDM_ROUNDS=$((rounds + 1))
must "the server is up for one more round" compose up --detach --no-deps server
must "   (and healthy)" until_true 120 is_healthy "$server"
check "hospital-a and hospital-b, whose kits are good, are let in" eval \
  'compose up --detach --no-deps hospital-a hospital-b && until_true 120 has_said '"$server"' "2 of 3 clients are there"'
provision() { compose run --rm --no-deps --no-TTY --entrypoint maskdm-server provision provision "$@"; }
check "the kit of hospital-c is revoked" provision revoke hospital-c
check "   (the running server says so)" until_true 30 has_said "$server" "hospital-c is let in no more"
mkdir --mode 777 "$work/other"
stranger() { docker run --rm --name "$project-authority" --user "$user:$user" --network none --volume "$work/other:/kits" "$project-server" provision "$@"; }
must "another authority makes a kit for the same server" stranger --out /kits --server server:8000 --client stranger
# client NAME [options of docker] -- [options of maskdm-client]
client() {
  local name=$1 options=()
  shift
  while [[ $1 != -- ]]; do options+=("$1") && shift; done
  docker run --detach --init --name "$project-$name" --user "$user:$user" --read-only --tmpfs /tmp --cap-drop ALL \
    --tmpfs /data:exec,mode=1777 --network "${project}_hospital-c" \
    --volume "${project}_hospital-c-images:/images:ro" "${options[@]}" "$project-client" \
    --data /images --out /data --threads 1 --wait 5 "${@:2}" >/dev/null
}
client revoked --volume "${project}_hospital-c-kit:/kit:ro" -- --kit /kit/kit.zip
client stranger --volume "$work/other/stranger.zip:/kit/kit.zip:ro" -- --kit /kit/kit.zip
client insecure -- --server server:8000 --insecure
check_refused() {
  check "$2 is refused, and says so" until_true 150 has_exited_with "$project-$1" 1 "does not let this site in"
  check "   (it was never let in)" not has_said "$project-$1" "joined server"
}
has_exited_with() { [[ $(docker inspect --format '{{.State.Status}} {{.State.ExitCode}}' "$1") == "exited $2" ]] && has_said "$1" "$3"; }
check_refused revoked "a client whose kit was revoked"
check_refused stranger "a client whose kit is of another authority"
check_refused insecure "a client without TLS"
client unasked -- --server server:8000
check "without a kit, a client does not connect to another machine unless it is told to" \
  until_true 60 has_exited_with "$project-unasked" 2 "another machine"
check "the server served all the while, and did not begin a round" eval \
  "[[ \$(state $server) == running ]] && [[ \$(lines $work/federation/rounds.jsonl) == $rounds ]]"

echo "-- any user"
anyone() {
  docker run --rm --name "$project-anyone" --init --read-only --tmpfs /tmp --cap-drop ALL --network none --user 54321:54321 \
    --volume "$project-anyone:/data" "$@"
}
check "user 54321, who has no name and no home, draws images and pre-trains" anyone --entrypoint sh "$project-server" -ec \
  'mkdir images && python -m maskdm_server.lab.faces public 40 16 images && maskdm-server pretrain --data images --out prior --size tiny --image-size 16 --mask none --steps 2 --batch-size 8'
check "   and looks them over as a client" anyone --entrypoint sh "$project-client" -ec \
  'maskdm-client doctor --data images --prior prior/prior.safetensors || [ $? = 1 ]; ls maskdm-doctor/contact-sheet.png'
