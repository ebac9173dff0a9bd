#!/bin/bash
# A real SLURM of one node on this machine, for tests: two CPUs, and two GPUs that are only names.
#
#   sudo tests/slurm_cluster.sh start DIR     Debian packages slurm-wlm and munge; prints nothing and returns when it takes jobs
#   export SLURM_CONF=DIR/slurm.conf          what sbatch, squeue and the rest then need
#   sudo tests/slurm_cluster.sh stop DIR
set -euo pipefail
action=$1
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

if [ "$action" = stop ]; then
    for daemon in slurmd slurmctld munged; do
        if [ -f "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true; fi
    done
    exit
fi

mkdir -p "$dir/state" "$dir/spool" "$dir/munge"
port=$((20000 + RANDOM % 20000))
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 / 2))
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS nproc) RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
printf 'Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n' > "$dir/gres.conf"

# munged refuses keys and folders that others may write.
dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
chmod 0600 "$dir/munge/key"
chmod 0755 "$dir/munge"
chown -R munge: "$dir/munge"
runuser -u munge -- munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/munged.pid" \
    --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed"
cp "$dir/munge/munged.pid" "$dir/munged.pid"
slurmctld
slurmd
for _ in $(seq 60); do
    if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then exit; fi
    sleep 0.5
done
echo "SLURM does not come up: see $dir/slurmctld.log and $dir/slurmd.log" >&2
exit 1
