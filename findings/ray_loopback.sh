#!/usr/bin/env bash
# Ray 2.60.0 on Linux: ``ray.init(_node_ip_address="127.0.0.1")`` does not keep a local instance on the loopback. The
# address is taken, and then replaced by that of the machine's network, which nodes report and on which their ports are
# reached. With RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 in the environment before Ray is imported, a switch that by its name
# is about other systems, all stays on 127.0.0.1.
# Exits 0 while that is so, 1 when it changes. Needs pip, a network, and an address besides the loopback; uses a
# temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ray==2.60.0 psutil
cat > "$folder/where.py" <<'PY'
import psutil
import ray

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
family = {psutil.Process().pid, *(child.pid for child in psutil.Process().children(recursive=True))}
ports = [c for c in psutil.net_connections("tcp") if c.pid in family and c.status == psutil.CONN_LISTEN]
listening = {port.laddr.ip.removeprefix("::ffff:") for port in ports}
reported = {node["NodeManagerAddress"] for node in ray.nodes()}
only = reported == {"127.0.0.1"} and listening <= {"127.0.0.1", "::1"}
print("ray", ray.__version__, "loopback only" if only else "other addresses too")
ray.shutdown()
PY
cd "$folder"
export HOME="$folder"
asked=$(venv/bin/python -W ignore where.py 2> log | tail -1)
switched=$(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 venv/bin/python -W ignore where.py 2>> log | tail -1)
echo "asked for 127.0.0.1: $asked"
echo "with the switch: $switched"
[[ "$asked" == *"other addresses too" ]] && [[ "$switched" == *"loopback only" ]]
