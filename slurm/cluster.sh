#!/usr/bin/env bash
# A real two-node Slurm on one Debian box, for tests: munge, slurmctld and one slurmd per node, up in seconds.
#
#   slurm/cluster.sh up                 start it (installs missing packages); then: export SLURM_CONF=...
#   slurm/cluster.sh down               stop it and undo what `up` did, packages excepted
#   slurm/cluster.sh crash node2        power cut: every process of the node dies at once, daemon and tasks
#   slurm/cluster.sh revive node2       start the node again
#   slurm/cluster.sh cut node2          pull the network cable (NETWORK=own); `join node2` plugs it in again
#   slurm/cluster.sh hide node2 DIR     mount an empty folder over DIR on that node, as if DIR were not shared
#   slurm/cluster.sh prepare            install missing packages, and say what else keeps a cluster from running here
#   slurm/cluster.sh purge              remove the packages that were installed
#
# Each node is a set of namespaces: its own host name, processes and mounts; with NETWORK=own its own address too.
# Settings, by environment: LAB (state folder), NODES, CPUS and GPUS per node, NETWORK=shared|own, ACCOUNTING=yes for
# slurmdbd on a MariaDB of its own, with account `lab` and QOS `quick` for root and nothing else allowed.
set -euo pipefail

LAB=${LAB:-/tmp/mtbert-slurm}
NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-2} NETWORK=${NETWORK:-shared} ACCOUNTING=${ACCOUNTING:-}
PACKAGES=(slurmctld slurmd slurm-client munge iproute2 procps)
[ -z "$ACCOUNTING" ] || PACKAGES+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core)
DATABASE_PORT=33306
MARK='# mtbert slurm cluster'
NET=10.87.0 BRIDGE=mtbert0
export SLURM_CONF=$LAB/slurm.conf

die() { echo "slurm/cluster.sh: $*" >&2; exit 1; }

main() {
    local verb=${1:-}
    [[ $verb =~ ^(up|down|crash|revive|cut|join|hide|prepare|purge)$ ]] || { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0"; exit 2; }
    [ "$(id -u)" = 0 ] || die "needs root: it makes namespaces and runs system daemons"
    [[ $verb =~ ^(up|down|prepare|purge)$ ]] || [ -s "$LAB/network" ] || die "no cluster in $LAB"
    # root runs what its configuration says, and kills and removes what it names
    [ ! -e "$LAB" ] || { [ -O "$LAB" ] && [ ! -L "$LAB" ]; } || die "$LAB is not root's; remove it, or set LAB to another folder"
    [ ! -s "$LAB/network" ] || NETWORK=$(cat "$LAB/network")
    "$@"
}

up() {
    [ ! -e "$LAB/slurmctld.pid" ] || die "already up in $LAB; slurm/cluster.sh down first"
    prepare
    mkdir -p -m 755 "$LAB"
    mkdir -p "$LAB"/{state,spool,log}
    echo "$NETWORK" >"$LAB/network"
    echo "$NODES" >"$LAB/nodes"
    local node
    for node in $(nodes); do echo "$(address "$node") $node $MARK" >>/etc/hosts; done
    [ "$NETWORK" = shared ] || make_network
    if ! munge -n >/dev/null 2>&1; then
        install -d -o munge -g munge /run/munge
        runuser -u munge -- munged --pid-file=/run/munge/munged.pid
        cp /run/munge/munged.pid "$LAB/munged.pid"
    fi
    write_configuration
    [ -z "$ACCOUNTING" ] || start_accounting
    slurmctld
    for node in $(nodes); do revive "$node"; done
    wait_until 30 "nodes did not become idle; see $LAB/log" all_idle
    sinfo
    echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    [ -s "$LAB/network" ] || { echo "no cluster in $LAB"; return; }
    [ ! -s "$LAB/nodes" ] || NODES=$(cat "$LAB/nodes")
    local node
    if [ -s "$LAB/slurmctld.pid" ]; then
        scancel --user=root 2>/dev/null || true
        wait_until 10 "" no_jobs || true
    fi
    for node in $(nodes); do crash "$node"; done
    stop "$LAB/slurmctld.pid"
    stop "$LAB/slurmdbd.pid"
    stop "$LAB/mariadb.pid"
    stop "$LAB/munged.pid"
    for node in $(nodes); do ! ip netns list 2>/dev/null | grep -qw "$node" || ip netns del "$node"; done
    ! ip link show $BRIDGE >/dev/null 2>&1 || ip link del $BRIDGE
    # not sed -i: in a container /etc/hosts is a mount that cannot be replaced
    local rest
    rest=$(grep -v "$MARK" /etc/hosts) && echo "$rest" >/etc/hosts
    [ ! -s "$LAB/installed" ] || echo "packages stay installed ($(tr '\n' ' ' <"$LAB/installed")); purge removes them"
    (cd "$LAB" && rm -rf state spool log mysql network nodes ./*.conf ./*.pid ./*.init)
}

prepare() {
    install_packages
    unshare --uts --pid --mount-proc --fork true 2>/dev/null || die "may not make namespaces here (a container without SYS_ADMIN?)"
    if [ "$NETWORK" = own ]; then
        ip netns add mtbert-probe 2>/dev/null || die "may not make network namespaces here (a container without NET_ADMIN?)"
        ip netns del mtbert-probe
    fi
}

install_packages() {
    local missing=() missing_still= package
    for package in "${PACKAGES[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "needs Debian's packages ${missing[*]}, and there is no apt-get here"
    echo "installing ${missing[*]}"
    apt-get update -qq || die "apt-get cannot reach its packages"
    # the packages' own services would start a cluster without configuration
    local policy=/usr/sbin/policy-rc.d ours=
    [ -e $policy ] || { ours=1; printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; }
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || missing_still=1
    [ -z "$ours" ] || rm $policy
    [ -z "$missing_still" ] || die "apt-get cannot install ${missing[*]}"
    mkdir -p -m 755 "$LAB"
    printf '%s\n' "${missing[@]}" >>"$LAB/installed"
}

purge() {
    [ -s "$LAB/installed" ] || { echo "nothing was installed"; return; }
    xargs apt-get purge -y -qq <"$LAB/installed" >/dev/null
    rm "$LAB/installed"
}

# ------------------------------------------------------------------------------------------- accounting

start_accounting() {
    local socket=$LAB/mysql/socket options=(--no-defaults --user=root "--datadir=$LAB/mysql")
    mkdir -p "$LAB/mysql"
    mariadb-install-db "${options[@]}" --skip-test-db >"$LAB/log/mariadb-install.log" 2>&1
    setsid mariadbd "${options[@]}" --bind-address=127.0.0.1 --port=$DATABASE_PORT --socket="$socket" \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
        --performance-schema=OFF --skip-name-resolve </dev/null >"$LAB/log/mariadb.log" 2>&1 &
    echo $! >"$LAB/mariadb.pid"
    wait_until 30 "MariaDB did not start; see $LAB/log" mariadb --no-defaults -u root -S "$socket" -e "
        create database if not exists slurm_acct_db;
        create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm';
        grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1'" 2>/dev/null
    cat >"$LAB/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DATABASE_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/slurmdbd.pid
CONF
    chmod 600 "$LAB/slurmdbd.conf"
    slurmdbd
    wait_until 30 "slurmdbd did not start; see $LAB/log" sacctmgr -i add cluster mtbert >/dev/null 2>&1
    {
        sacctmgr -i add qos quick
        sacctmgr -i add account lab cluster=mtbert
        sacctmgr -i add user root account=lab cluster=mtbert
        sacctmgr -i modify user root where cluster=mtbert account=lab set qos=normal,quick defaultqos=normal defaultaccount=lab
    } >"$LAB/log/sacctmgr.log"
}

# ------------------------------------------------------------------------------------------------ nodes

nodes() { seq -f node%g "$NODES"; }
number() { echo "${1#node}"; }
address() { if [ "$NETWORK" = own ]; then echo "$NET.$(number "$1")"; else echo 127.0.0.1; fi; }
init_of() { cat "$LAB/$1.init" 2>/dev/null; }
namespaces_of() { pgrep -P "$(init_of "$1")"; }

# bash is process 1 of the node and reaps its orphans; with it dies everything in the namespace
revive() {
    local node=$1 enter=()
    [ "$NETWORK" = shared ] || enter=(nsenter "--net=/run/netns/$node")
    mkdir -p "$LAB/spool/$node"
    rm -f "$LAB/slurmd-$node.pid"
    setsid "${enter[@]}" unshare --uts --pid --mount-proc --fork --kill-child \
        bash -c "hostname $node; slurmd -D -N $node & wait" </dev/null >>"$LAB/log/$node.out" 2>&1 &
    echo $! >"$LAB/$node.init"
    wait_until 10 "$node did not start; see $LAB/log/$node.out" test -s "$LAB/slurmd-$node.pid"
}

crash() {
    local init
    init=$(init_of "$1") || return 0
    kill -9 "$init" 2>/dev/null || true
    wait_until 10 "$1 lives on" dead "$init"
    rm -f "$LAB/$1.init"
}

hide() { nsenter --mount --target "$(namespaces_of "$1")" mount -t tmpfs none "$2"; }

# --------------------------------------------------------------------------------------------- network

make_network() {
    ip link add $BRIDGE type bridge
    ip address add $NET.254/24 dev $BRIDGE
    ip link set $BRIDGE up
    local node link
    for node in $(nodes); do
        link=mtb$(number "$node")
        ip netns add "$node"
        ip link add "$link" type veth peer name eth0 netns "$node"
        ip link set "$link" master $BRIDGE up
        ip -n "$node" address add "$(address "$node")/24" dev eth0
        ip -n "$node" link set eth0 up
        ip -n "$node" link set lo up
    done
}

cut() { [ "$NETWORK" = own ] || die "cut needs NETWORK=own"; ip link set "mtb$(number "$1")" down; }
join() { ip link set "mtb$(number "$1")" up; }

# --------------------------------------------------------------------------------------- configuration

write_configuration() {
    local host controller=127.0.0.1 node devices=(/dev/null /dev/zero /dev/full /dev/random)
    host=$(hostname -s)
    [ "$NETWORK" = shared ] || controller=$NET.254
    cat >"$LAB/slurm.conf" <<CONF
ClusterName=mtbert
SlurmctldHost=$host($controller)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for the old credential to expire; the default is two minutes
AuthInfo=cred_expire=5
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdPidFile=$LAB/slurmd-%n.pid
SlurmdLogFile=$LAB/log/%n.log
SlurmdSpoolDir=$LAB/spool/%n
StateSaveLocation=$LAB/state
# fresh job ids in every life of the cluster
FirstJobId=$(($(date +%s) % 60000000 + 1))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
$(if [ -z "$ACCOUNTING" ]; then echo AccountingStorageType=accounting_storage/none; else
    echo AccountingStorageType=accounting_storage/slurmdbd
    echo AccountingStorageHost=127.0.0.1
    echo AccountingStorageEnforce=associations,qos
fi)
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# what cannot run is refused, not queued for ever
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName=DEFAULT CPUs=$CPUS RealMemory=8000 State=UNKNOWN$([ "$GPUS" = 0 ] || echo " Gres=gpu:$GPUS")
$(for node in $(nodes); do
        echo "NodeName=$node NodeHostname=$host NodeAddr=$(address "$node") Port=$((17000 + $(number "$node")))"
    done)
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
CONF
    # GPUs in name only: any device file does, for Slurm counts them and sets CUDA_VISIBLE_DEVICES
    : >"$LAB/gres.conf"
    [ "$GPUS" = 0 ] || for node in $(nodes); do
        echo "NodeName=$node Name=gpu File=$(IFS=,; echo "${devices[*]:0:$GPUS}")" >>"$LAB/gres.conf"
    done
}

# --------------------------------------------------------------------------------------------- waiting

wait_until() { # seconds, complaint, command...
    local deadline=$((SECONDS + $1)) complaint=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $deadline ] || { [ -z "$complaint" ] || die "$complaint"; return 1; }
        sleep 0.1
    done
}
all_idle() { [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l)" = "$NODES" ]; }
no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }
dead() { ! kill -0 "$1" 2>/dev/null; }
stop() {
    [ -s "$1" ] || return 0
    local pid
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    wait_until 10 "process $pid does not stop" dead "$pid"
    rm -f "$1"
}

main "$@"
