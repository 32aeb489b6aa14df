#!/bin/bash
# Runs a torchrun command as two hosts of one machine: two network namespaces with a cable between them.
#
#   benchmarks/two_hosts.sh .venv/bin/torchrun --nproc-per-node 2 benchmarks/SCRIPT.py --model-path MODEL ...
#
# Each namespace has its own loopback and its own address, and reaches nothing but the other; files, memory and the
# page cache are shared. Needs root and `ip` (iproute2). Whatever happens, processes and namespaces are gone afterwards.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 TORCHRUN [OPTION ...] SCRIPT [ARGUMENT ...]" >&2
    exit 2
fi
launcher=$1
shift

names=(weightload-$$-a weightload-$$-b)
addresses=(10.213.77.1 10.213.77.2)
cable=cable0

clean_up() {
    trap - EXIT
    trap '' INT TERM HUP
    # A launcher ends its workers when it is told to end; what does not end within five seconds is killed.
    for signal in TERM KILL; do
        for name in "${names[@]}"; do
            ip netns pids "$name" 2>/dev/null | xargs -r kill -$signal 2>/dev/null || true
        done
        for _ in $(seq 50); do
            [ -z "$(for name in "${names[@]}"; do ip netns pids "$name" 2>/dev/null || true; done)" ] && break
            sleep 0.1
        done
    done
    wait || true
    for name in "${names[@]}"; do
        ip netns del "$name" 2>/dev/null || true
    done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for name in "${names[@]}"; do
    ip netns add "$name"
done
ip link add $cable netns "${names[0]}" type veth peer name $cable netns "${names[1]}"
for host in 0 1; do
    ip -n "${names[$host]}" addr add "${addresses[$host]}/30" dev $cable
    ip -n "${names[$host]}" link set lo up
    ip -n "${names[$host]}" link set $cable up
done

# Host names lead nowhere in here: gloo and NCCL are told the interface, torchrun the addresses.
export GLOO_SOCKET_IFNAME=$cable NCCL_SOCKET_IFNAME=$cable
for host in 0 1; do
    ip netns exec "${names[$host]}" "$launcher" --nnodes=2 --node-rank=$host --master-addr="${addresses[0]}" \
        --master-port=29500 --local-addr="${addresses[$host]}" "$@" &
done
# The first to fail ends the run; the other would wait for it for minutes.
wait -n
wait -n
