#!/bin/sh
# A real Slurm of one node over loopback, for tests: munged, slurmctld and slurmd of Debian's
# packages, with their configuration, keys, state and logs in a directory of their own.
#
#   slurm.sh install     installs the packages where they are missing (root on Debian or Ubuntu)
#   slurm.sh start DIR   starts it; then `export SLURM_CONF=DIR/slurm.conf` and use sbatch
#   slurm.sh stop DIR    ends its jobs and daemons
#
# CPUS (4) is how many cores the node claims. A requeued job waits for cred_expire, 10 seconds.
# Jobs of the partition `urgent` preempt those of the default one, which get a minute to save.
# Exit code 3: it cannot run here, and why.
set -eu

fail() { echo "$1" >&2; exit 3; }

install() {
  PATH=$PATH:/usr/sbin:/sbin
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null &&
    command -v munged >/dev/null && return
  [ "$(id -u)" = 0 ] || fail "Slurm's packages are missing and only root can install them"
  command -v apt-get >/dev/null || fail "Slurm's packages are missing and there is no apt-get"
  export DEBIAN_FRONTEND=noninteractive
  lock="-o DPkg::Lock::Timeout=300"
  apt-get $lock update -qq >/dev/null
  apt-get $lock install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

free_port() {
  "${PYTHON:-python3}" -c \
    'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

start() {
  PATH=$PATH:/usr/sbin:/sbin
  [ "$(id -u)" = 0 ] || fail "slurmd starts jobs as root only"
  mkdir -p "$1/state" "$1/spool"
  dir=$(cd "$1" && pwd)
  chmod 755 "$dir"
  host=$(hostname -s)
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 600 "$dir/munge.key"
  # munged insists on a safe directory for its socket; --force makes that a warning.
  munged --force --num-threads=1 --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" \
    2>"$dir/munged.err"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
KillWait=20
MinJobAge=300
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-4} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
  export SLURM_CONF="$dir/slurm.conf"
  slurmctld -c
  slurmd -c
  for _ in $(seq 600); do
    [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && return
    sleep 0.1
  done
  sinfo -R >&2 || true
  tail -n 3 "$dir/slurmctld.log" "$dir/slurmd.log" >&2
  stop "$dir"
  echo "the node did not come up" >&2
  exit 1
}

stop() {
  dir=$(cd "$1" && pwd)
  export SLURM_CONF="$dir/slurm.conf"
  scancel --full --signal=KILL --state=RUNNING 2>/dev/null || true
  for partition in test urgent; do
    scancel --partition=$partition 2>/dev/null || true
  done
  for _ in $(seq 50); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.1
  done
  for name in slurmd slurmctld munged; do
    [ -f "$dir/$name.pid" ] || continue
    pid=$(cat "$dir/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true  # slurmd waits for jobs that do not end
  done
}

command=${1:-}
case "$command" in
  install) install ;;
  start | stop) "$command" "${2:?give a directory}" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
