#!/usr/bin/env bash
# A real SLURM cluster on this machine, for the tests: munged, slurmctld and two slurmd from Debian's packages.
#
#     sudo tests/slurm/cluster.sh start DIR      installs what is missing, prints `export SLURM_CONF=...`
#     sudo tests/slurm/cluster.sh stop DIR       ends every process and removes every network it made
#     sudo tests/slurm/cluster.sh kill DIR NODE  the node dies: slurmd and all it had started, at once
#     sudo tests/slurm/cluster.sh boot DIR NODE  and comes back
#
# DIR holds configuration, state and logs; it is made, and must be short (socket paths) and readable by all.
# Nodes are vn1 and vn2, each in a host name, mount and network namespace of its own where the kernel lets us, so that
# 127.0.0.1 of one is not that of the other; the file system is shared. Partitions: main (the default), and urgent,
# which preempts it with 10 s of grace by requeueing. /etc/slurm and the services of this machine are left alone.
#
# Exit status: 0 done, 4 something is missing (no root, no packages), 1 it did not come up.
set -uo pipefail
umask 022
PATH=$PATH:/usr/sbin:/sbin
NODES=2

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { local status=$1; shift; say "$*"; exit "$status"; }

verb=${1:-} dir=${2:-} node=${3:-}
[[ $verb =~ ^(start|stop|kill|boot)$ && $dir == /* ]] || die 2 "start DIR | stop DIR | kill DIR NODE | boot DIR NODE"
[ "$(id -u)" = 0 ] || die 4 "needs root: slurmd, network namespaces"
export SLURM_CONF=$dir/slurm.conf
id=$(printf %s "$dir" | cksum | cut -d ' ' -f 1)
port=$((21000 + id % 150 * 20))  # clusters of two directories do not meet
net=10.214.$((id % 250 + 1))
bridge=$(printf 'vac%05x' $((id % 1048576)))

until_true() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

install_packages() {
    local want=()
    command -v munged >/dev/null || want+=(munge)
    command -v slurmctld >/dev/null || want+=(slurmctld)
    command -v slurmd >/dev/null || want+=(slurmd)
    command -v srun >/dev/null || want+=(slurm-client)
    command -v ip >/dev/null || want+=(iproute2)
    [ ${#want[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die 4 "not installed, and there is no apt-get: ${want[*]}"
    say "installing ${want[*]}"
    local policy=/usr/sbin/policy-rc.d ours=no status=0
    if [ ! -e $policy ]; then # the packages must not start the services of this machine
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && ours=yes
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${want[@]}" >"$dir/apt.log" 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${want[@]}"; } >>"$dir/apt.log" 2>&1 ||
        status=1
    [ $ours = no ] || rm -f $policy
    [ $status = 0 ] || { tail -n 5 "$dir/apt.log" >&2; die 4 "apt-get could not install ${want[*]}"; }
}

# Which kind of cluster this kernel allows: namespaces, and cgroups to hold the processes of a job together.
probe() {
    spaces=no network=no track=linuxproc
    unshare --uts --mount true 2>/dev/null && spaces=yes
    if [ $spaces = yes ] && ip link add "$bridge" type bridge 2>/dev/null; then
        ip link add "${bridge}x" type veth peer name "${bridge}y" 2>/dev/null && ip netns add "$bridge-x" 2>/dev/null &&
            network=yes
        ip link del "${bridge}x" 2>/dev/null
        ip netns del "$bridge-x" 2>/dev/null
        ip link del "$bridge" 2>/dev/null
    fi
    freezer=$(awk '$3 == "cgroup" && $4 ~ /(^|,)freezer(,|$)/ {print $2; exit}' /proc/mounts)
    if [[ $freezer == */freezer ]] && mkdir "$freezer/$bridge" 2>/dev/null; then
        rmdir "$freezer/$bridge"
        track=cgroup
    fi
    declare -p spaces network track freezer >"$dir/kind"
}

address() { [ $network = yes ] && echo "$net.$((10 + $1))" || echo "127.214.$((id % 250 + 1)).$((10 + $1))"; }

write_config() {
    local host number control=127.0.0.1
    host=$(hostname -s)
    [ "$network" = no ] || control=$net.1
    (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
    {
        printf '127.0.0.1 localhost\n%s %s\n' $control "$host"
        for ((number = 1; number <= NODES; number++)); do echo "$(address $number) vn$number"; done
    } >"$dir/hosts"
    cat >"$SLURM_CONF" <<CONF
ClusterName=vac
SlurmctldHost=$host($control)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/$track
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
SlurmdTimeout=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
CONF
    for ((number = 1; number <= NODES; number++)); do
        echo "NodeName=vn$number NodeAddr=$(address $number)" \
            "NodeHostname=$([ $spaces = yes ] && echo vn$number || echo "$host")" \
            "Port=$((port + 1 + number)) CPUs=64 RealMemory=65536 Gres=gpu:16 State=UNKNOWN"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
    echo "Name=gpu File=$dir/gpu[0-15]" >"$dir/gres.conf" # stand-ins, so that scripts that ask for GPUs get them
    for ((number = 0; number < 16; number++)); do mknod -m 666 "$dir/gpu$number" c 1 3 || return 1; done
    rm -f "$dir/cgroup.conf"
    if [ $track = cgroup ]; then
        printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\nCgroupAutomount=no\n' "${freezer%/freezer}" >"$dir/cgroup.conf"
    fi
}

network_up() {
    [ $network = yes ] || return 0
    local number space
    ip link add "$bridge" type bridge && ip addr add "$net.1/24" dev "$bridge" && ip link set "$bridge" up || return 1
    for ((number = 1; number <= NODES; number++)); do
        space=$bridge-$number
        ip netns add "$space" &&
            ip link add "$bridge$number" type veth peer name eth0 netns "$space" &&
            ip link set "$bridge$number" master "$bridge" up &&
            ip -n "$space" addr add "$(address $number)/24" dev eth0 &&
            ip -n "$space" link set lo up && ip -n "$space" link set eth0 up || return 1
    done
}

network_down() {
    local name
    command -v ip >/dev/null || return 0
    for name in /sys/class/net/"$bridge"*; do [ -e "$name" ] && ip link del "${name##*/}"; done
    for name in /run/netns/"$bridge"-*; do [ -e "$name" ] && ip netns del "${name##*/}"; done
    return 0
}

start_node() { # vnN
    local enter=()
    mkdir -p "$dir/spool/$1"
    if [ "$spaces" = yes ]; then
        [ "$network" = no ] || enter=(nsenter "--net=/run/netns/$bridge-${1#vn}")
        # shellcheck disable=SC2016
        "${enter[@]}" unshare --uts --mount --propagation slave \
            sh -c 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"' \
            sh "$1" "$dir/hosts" slurmd -f "$SLURM_CONF" -N "$1" 8>&-
    else
        slurmd -f "$SLURM_CONF" -N "$1" 8>&-
    fi
}

# Processes of this cluster: daemons name its directory on their command line, and all others have its configuration in
# their environment, jobs beside the name of their node.
processes() {
    local entry
    for entry in /proc/[0-9]*; do
        if [[ $(cat "$entry/comm" 2>/dev/null) =~ ^(munged|slurm) ]]; then
            tr '\0' '\n' 2>/dev/null <"$entry/cmdline" | grep -qE "^(--[a-z-]+=)?$dir/" ||
                tr '\0' '\n' 2>/dev/null <"$entry/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" || continue
        else
            of_job "$entry" '.*' || continue
        fi
        echo "${entry#/proc/}"
    done
}
of_job() { # /proc/PID NODE
    tr '\0' '\n' 2>/dev/null <"$1/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" &&
        tr '\0' '\n' 2>/dev/null <"$1/environ" | grep -qx "SLURMD_NODENAME=$2"
}

# slurmd, its steps and what they had started. Without namespaces the steps of two nodes cannot be told apart: the jobs
# are killed all the same, and SLURM cleans up behind them.
kill_node() { # vnN
    local pid entry doomed=()
    pid=$(cat "$dir/$1.pid") || die 1 "$1 does not run"
    for entry in /proc/[0-9]*; do
        if [[ $(cat "$entry/comm" 2>/dev/null) == slurmstepd ]]; then
            [ "$spaces" = yes ] || continue
            [ "$(readlink "$entry/ns/uts")" = "$(readlink "/proc/$pid/ns/uts")" ] || continue
        else
            of_job "$entry" "$1" || continue
        fi
        doomed+=("${entry#/proc/}")
    done
    kill -KILL "$pid" "${doomed[@]}" 2>/dev/null
    rm -f "$dir/$1.pid"
}

controller_up() { [[ $(scontrol ping) == *" is UP"* ]]; }
nodes_idle() { [ "$(sinfo -h -N -p main -o %T | grep -cx idle)" = $NODES ]; }

bring_up() {
    local number
    network_up || { say "no network between the nodes"; return 1; }
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" >&2 8>&- || { say "munged did not start"; return 1; }
    slurmctld -f "$SLURM_CONF" >&2 8>&- || { say "slurmctld did not start"; return 1; }
    until_true 30 controller_up || { say "slurmctld does not answer"; return 1; }
    for ((number = 1; number <= NODES; number++)); do
        start_node vn$number >&2 || { say "slurmd of vn$number did not start"; return 1; }
    done
    until_true 60 nodes_idle || { say "the nodes did not become idle"; sinfo >&2; return 1; }
    timeout 60 srun -Q -N$NODES -n$NODES true || { say "a first srun over both nodes failed"; return 1; }
    until_true 30 nodes_idle
}

take_down() {
    local try name pids
    if controller_up 2>/dev/null; then
        timeout 20 scancel --user=root 2>/dev/null
        # shellcheck disable=SC2016
        until_true 3 sh -c '[ -z "$(squeue -h -t R,CG)" ]' || true
    fi
    for ((try = 0; try < 20; try++)); do
        pids=$(processes)
        [ -n "$pids" ] || break
        # shellcheck disable=SC2086
        kill "-$([ "$try" -lt 2 ] && echo TERM || echo KILL)" $pids 2>/dev/null
        sleep 0.3
    done
    network_down
    for name in vn1 vn2; do
        find "/sys/fs/cgroup/freezer/slurm_$name" -depth -type d -exec rmdir {} \; 2>/dev/null
    done
    rm -f "$dir"/*.pid
    [ -z "$(processes)" ]
}

case $verb in
start)
    mkdir -p "$dir" || exit 1
    chmod 755 "$dir"
    install_packages
    take_down
    # Two clusters would share the cgroups of their jobs, for those are named by node and number.
    other=$(pgrep -af -- "^slurmd .*-N vn1" | sed -n 's|.* -f \(.*\)/slurm.conf .*|\1|p')
    [ -z "$other" ] || die 1 "another cluster of this script runs on this machine: $0 stop $other"
    rm -rf "${dir:?}"/{state,spool,munge} "$dir"/gpu*
    mkdir -p "$dir"/{state,spool,munge}
    chmod 700 "$dir/state"
    probe
    write_config || die 1 "the configuration could not be written"
    begun=$SECONDS
    if ! bring_up; then
        tail -n 8 "$dir"/*.log >&2
        take_down
        die 1 "the cluster did not come up; logs in $dir"
    fi
    say "$NODES nodes up in $((SECONDS - begun)) s (namespaces: $spaces, network: $network, proctrack: $track)"
    printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
    ;;
stop)
    [ -d "$dir" ] || exit 0
    take_down || die 1 "some processes did not end: $(processes | xargs)"
    say "stopped"
    ;;
kill)
    # shellcheck disable=SC1091
    source "$dir/kind" && kill_node "$node"
    ;;
boot)
    # shellcheck disable=SC1091
    source "$dir/kind" && start_node "$node" >&2 && until_true 30 test -s "$dir/$node.pid"
    ;;
esac
