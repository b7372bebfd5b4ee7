#!/bin/bash
# The main job, step by step, on this machine alone: two hosts in network namespaces, a real web
# server on one, an unmodified curl on the other, and attested TLS between them.
#
#   sudo packaging/demo.sh            TNGD and TNGCTL name other binaries than target/*/
#
# Each step says what it shows and checks it. Exit status 0 means that every check held.
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
if [[ -t 1 ]]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' off=$'\e[0m'
else
    bold='' dim='' green='' red='' off=''
fi

checks=0
failures=0
step=0

title() { step=$((step + 1)); printf '\n%s%d. %s%s\n' "$bold" "$step" "$1" "$off"; }
note() { printf '   %s\n' "$1"; }
shown() { sed "s/^/   $dim| /; s/\$/$off/"; }

# check TEXT COMMAND...: runs the command and says whether it held.
check() {
    local text=$1
    shift
    checks=$((checks + 1))
    if "$@" >/dev/null 2>&1; then
        printf '   %sok%s    %s\n' "$green" "$off" "$text"
    else
        failures=$((failures + 1))
        printf '   %sFAIL%s  %s\n' "$red" "$off" "$text"
    fi
}

fails() { ! "$@"; }
die() { printf '%s%s%s\n' "$red" "$1" "$off" >&2; exit 1; }

# await SECONDS COMMAND...: waits until the command succeeds.
await() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.05
    done
}

# --- what it needs ----------------------------------------------------------------------------

[[ $(id -u) == 0 ]] || die "the demo makes network namespaces: run it as root (sudo make demo)"
declare -A package=([ip]=iproute2 [nft]=nftables [nsenter]=util-linux [nginx]=nginx-light [curl]=curl [tcpdump]=tcpdump)
missing=()
for tool in "${!package[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
done
if ((${#missing[@]})); then
    note "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null ||
        die "cannot install ${missing[*]}: run apt-get update and try again"
fi
find_binary() {
    local candidate
    for candidate in "${2:-}" "target/release/$1" "target/debug/$1"; do
        [[ -n $candidate && -x $candidate ]] && { realpath "$candidate"; return; }
    done
    die "no $1 here: run cargo build --release first"
}
tngd=$(find_binary tngd "${TNGD:-}") || exit 1
tngctl=$(find_binary tngctl "${TNGCTL:-}") || exit 1

# --- hosts ------------------------------------------------------------------------------------

name=tngd$$
work=$(mktemp -d "/tmp/$name.XXXX")
chmod 755 "$work"
started=$SECONDS

on() {
    local host=$1
    shift
    TNG_RUNTIME_DIR="$work/$host/run" TNG_CONFIG_DIR="$work/$host" nsenter --net="/run/netns/$name-$host" -- "$@"
}

clean_up() {
    local host pid
    for host in client router server; do
        # What runs in a namespace of ours was started by us.
        for pid in $(ip netns pids "$name-$host" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
        ip netns del "$name-$host" 2>/dev/null
    done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

for host in client router server; do
    mkdir -p "$work/$host/run"
    ip netns add "$name-$host" || die "cannot make a network namespace"
    on "$host" sh -c 'for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 >$f; done; ip link set lo up'
done
ip link add c0 netns "$name-client" type veth peer name r0 netns "$name-router"
ip link add s0 netns "$name-server" type veth peer name r1 netns "$name-router"
on router sh -ec 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
    for l in r0 r1; do ip link set $l up; done
    ip addr add 198.51.100.1/24 dev r0; ip addr add 2001:db8:1::1/64 dev r0 nodad
    ip addr add 203.0.113.1/24 dev r1; ip addr add 2001:db8:2::1/64 dev r1 nodad'
on client sh -ec 'ip link set c0 up; ip addr add 198.51.100.2/24 dev c0; ip addr add 2001:db8:1::2/64 dev c0 nodad
    ip route add default via 198.51.100.1; ip route add ::/0 via 2001:db8:1::1'
on server sh -ec 'ip link set s0 up; ip addr add 203.0.113.2/24 dev s0; ip addr add 2001:db8:2::2/64 dev s0 nodad
    ip route add default via 203.0.113.1; ip route add ::/0 via 2001:db8:2::1'

# --- a web server -----------------------------------------------------------------------------

secret="for-the-client-only-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')"
mkdir -p "$work/www"
echo "$secret" >"$work/www/index.html"
cat >"$work/nginx.conf" <<NGINX
daemon off;
pid $work/nginx.pid;
error_log $work/nginx-error.log;
events { }
http {
    log_format who '\$remote_addr \$request_uri';
    access_log $work/access.log who;
    server { listen 203.0.113.2:8080; listen [2001:db8:2::2]:8080; root $work/www; }
}
NGINX
(exec nsenter --net="/run/netns/$name-server" -- nginx -c "$work/nginx.conf" -e "$work/nginx-error.log") &
disown
v4=http://203.0.113.2:8080/
v6='http://[2001:db8:2::2]:8080/'
get() { on client curl -sS --noproxy '*' --max-time 3 "$1"; }
await 5 get "$v4" && await 5 get "$v6" || die "nginx does not answer: $(cat "$work/nginx-error.log")"

# record NAME COMMAND...: everything that crosses the router while the command runs.
record() {
    local file="$work/$1.pcap" log="$work/$1.tcpdump"
    shift
    (exec nsenter --net="/run/netns/$name-router" -- tcpdump -i any -U -w "$file") >"$log" 2>&1 &
    local pid=$!
    disown "$pid"
    await 5 grep -q 'listening on' "$log" || die "tcpdump does not start: $(cat "$log")"
    "$@" >/dev/null 2>&1
    # The last packet to see is one that we send on purpose, so nothing before it is missed.
    await 5 beacon "$file"
    kill "$pid" 2>/dev/null
}
beacon() {
    on client bash -c 'echo the-recording-is-complete >/dev/udp/203.0.113.2/9' 2>/dev/null
    grep -qa the-recording-is-complete "$1"
}
on_wire() { grep -qaF "$secret" "$work/$1.pcap"; }
# A TLS record that begins a TCP segment: 0x16 is a handshake, 0x17 data.
tls_on_wire() {
    local v4_type='tcp[(tcp[12] & 0xf0) >> 2]' v6_type='ip6[40 + ((ip6[52] & 0xf0) >> 2)]'
    [[ -n $(tcpdump -nr "$work/$1.pcap" "ip and tcp and ($v4_type = 0x16 or $v4_type = 0x17)" 2>/dev/null) ]] &&
        [[ -n $(tcpdump -nr "$work/$1.pcap" "ip6 and ip6[6] = 6 and ($v6_type = 0x16 or $v6_type = 0x17)" 2>/dev/null) ]]
}

# --- instances --------------------------------------------------------------------------------

cat >"$work/client/ingress.toml" <<'TOML'
[[ingress]]
name = "web"
[ingress.netfilter]
capture = [{ to = "203.0.113.0/24", port = 8080 }, { to = "2001:db8:2::/64", port = 8080 }]
[ingress.verify]
provider = "sample"
allow_sample = true
TOML
cat >"$work/server/egress.toml" <<'TOML'
[[egress]]
name = "web"
[egress.netfilter]
capture = [{ port = 8080 }]
[egress.attest]
provider = "sample"
TOML
sed -e '/attest/,$d' -e 's/name = "web"/name = "web"\nno_ra = true/' "$work/server/egress.toml" >"$work/server/impostor.toml"

declare -A run_pid
# start HOST INSTANCE: `tngd run`, until it is ready.
start() {
    # exec, so that the process id is tngd's own and not a shell's around it.
    (
        export TNG_RUNTIME_DIR="$work/$1/run" TNG_CONFIG_DIR="$work/$1"
        exec nsenter --net="/run/netns/$name-$1" -- "$tngd" run "$work/$1/$2.toml"
    ) >>"$work/$1/$2.log" 2>&1 &
    run_pid[$2]=$!
    await 10 on "$1" "$tngctl" status "$2" && return
    shown <"$work/$1/$2.log"
    die "instance $2 does not become ready"
}
# stop INSTANCE: a clean stop, to its end.
stop() {
    kill -TERM "${run_pid[$1]}" && wait "${run_pid[$1]}"
}
descendants() {
    local pid
    for pid in $(ps -o pid= --ppid "$1"); do descendants "$pid"; done
    echo "$1"
}
residue() {
    on "$1" nft list tables | grep tng
    on "$1" ip rule show pref 565
    on "$1" ip -6 rule show pref 565
    on "$1" ip route show table 565 2>/dev/null
    on "$1" ip -6 route show table 565 2>/dev/null
}
no_residue() { [[ -z $(residue "$1") ]]; }
got() { [[ $(get "$1") == "$secret" ]]; }
both() { got "$v4" && got "$v6"; }
neither() { fails got "$v4" && fails got "$v6"; }

# --- the demonstration ------------------------------------------------------------------------

title "Without tng: curl gets the page, and so does everyone on the wire"
record before both
get "$v4" | shown
check "the page arrives over IPv4 and IPv6" both
check "the capture between the hosts holds the page's text" on_wire before

title "Two files, two instances"
shown <"$work/client/ingress.toml"
echo
shown <"$work/server/egress.toml"
start server egress
start client ingress
check "tngctl status says that the egress is ready" on server "$tngctl" status egress
check "tngctl status says that the ingress is ready" on client "$tngctl" status ingress

title "The same curl again"
: >"$work/access.log"
record after both
get "$v4" | shown
check "the page arrives over IPv4 and IPv6" both
check "the capture between the hosts holds nothing of it" fails on_wire after
check "it holds TLS, over IPv4 and IPv6" tls_on_wire after
shown < <(sort "$work/access.log" | uniq -c)
check "the web server saw the client's own IPv4 address" grep -q '^198.51.100.2 ' "$work/access.log"
check "the web server saw the client's own IPv6 address" grep -q '^2001:db8:1::2 ' "$work/access.log"

title "Who is at the other end"
on client "$tngctl" status ingress | shown
on server "$tngctl" status egress | shown
check "the ingress shows its verdict on the egress" eval 'on client "$tngctl" status ingress | grep -qi sample'

title "A client without a tunnel is turned away by the egress"
outsider() { [[ $(on router curl -sS --noproxy '*' --max-time 3 "$1") == "$secret" ]]; }
check "over IPv4" fails outsider "$v4"
check "over IPv6" fails outsider "$v6"

title "A peer that shows no evidence is refused before the first byte"
stop egress
start server impostor
record impostor neither
check "curl gets nothing, over IPv4 and IPv6" neither
check "nothing of the page is on the wire" fails on_wire impostor
reasons=$(on client "$tngctl" status ingress)
grep -iE 'refus|reason' <<<"$reasons" | head -5 | shown
check "tngctl status names the reason" grep -qiE 'evidence' <<<"$reasons"
stop impostor
start server egress
check "with the right peer back, the page arrives again" both

title "kill -9 of every process of the ingress: refused, never in plaintext"
mapfile -t victims < <(descendants "${run_pid[ingress]}")
disown "${run_pid[ingress]}"
kill -9 "${victims[@]}"
await 5 eval 'fails kill -0 "${victims[@]}"'
record killed neither
get "$v4" 2>&1 | shown
check "curl gets nothing, over IPv4 and IPv6" neither
check "nothing of the page is on the wire" fails on_wire killed
start client ingress
check "the next start takes over and the page arrives again" both

title "A clean stop leaves no table, rule or route"
check "the ingress stops with exit status 0" stop ingress
check "the egress stops with exit status 0" stop egress
residue client | shown
residue server | shown
check "the client's host is as it was" no_residue client
check "the server's host is as it was" no_residue server
record stopped both
check "the direct path is open again, as the operator asked" on_wire stopped

printf '\n%s%d checks, %d failed, %d seconds%s\n' "$bold" "$checks" "$failures" "$((SECONDS - started))" "$off"
((failures == 0))
