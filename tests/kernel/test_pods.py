# SPDX-License-Identifier: GPL-2.0-or-later
"""Pods by their cgroups and by the kubelet's log folders; the layouts are in pod_layouts.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ksmd_ctl.kernel.machines import Membership, Origin, membership, runtime_paths, systemd_path
from ksmd_ctl.kernel.pods import Pod, PodPlace, place_of, running_pods
from tests.kernel.trees import write_tree

LAYOUTS = tomllib.loads((Path(__file__).parent / "pod_layouts.toml").read_text())["layout"]
UID = "a5c1f8d5-1919-434d-add7-4afaafdaef89"
SCOPE = f"/kubepods-burstable-pod{UID.replace('-', '_')}.slice/crio-{'0a' * 32}.scope"
CGROUP = f"0::/kubepods.slice/kubepods-burstable.slice{SCOPE}\n"
QEMU = ["/usr/libexec/qemu-kvm", "-name", "guest=shop_web,debug-threads=on"]
LONG = "a-name-of-a-machine-that-is-longer-than-a-generated-one"


def of(cgroup: str, pods: dict[str, Pod], command: list[str] | None = None) -> Membership:
    return membership(Origin(cgroup, command or ["cat"], "cat", 107, True, command is not None), pods)


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout["about"] for layout in LAYOUTS])
def test_recorded_layouts_give_the_pod(layout: dict[str, str]) -> None:
    text, uid, node = layout["cgroup"].strip() + "\n", layout["uid"], layout.get("node", "")
    assert [place for place in map(place_of, runtime_paths(text)) if place] == [PodPlace(uid, node)]
    found = of(text, {uid: Pod("shop", "web-0")})
    # What a container calls the pods in it says nothing of this host's.
    assert (found.group, found.namespace) == (("shop/web-0", "shop") if not node else (found.group, ""))
    assert found.group.endswith(f"/pod/{uid}") == bool(node)
    assert of(text, {}).group.endswith(f"pod/{uid}")


@pytest.mark.parametrize(
    "cgroup",
    [
        "/user.slice/user-1000.slice/user@1000.service/kubepods.slice" + SCOPE,
        "/../../../user.slice/user-1000.slice/user@1000.service/kubepods.slice" + SCOPE,
        "/system.slice/httpd.service/kubepods.slice" + SCOPE,
        "/lxc/205/kubepods.slice" + SCOPE,
        f"/system.slice/httpd.service/kubepods-pod{UID}.slice:cri-containerd:0a0a",
        f"/mykubepods/pod{UID}/0a0a",
        "/kubernetes.slice",
        "/",
        "",
    ],
)
def test_cgroups_that_the_kubelet_did_not_make_are_no_pods(cgroup: str) -> None:
    assert place_of(cgroup) is None


def test_what_is_the_kubelets_and_no_pods_has_no_uid() -> None:
    assert place_of("/kubepods.slice/kubepods-burstable.slice") == PodPlace("")
    assert of("0::/kubepods.slice/kubepods-burstable.slice\n", {}).group == "container/cat"


def test_the_kubelets_log_folders_name_the_pods(tmp_path: Path) -> None:
    static = "8daa50c3a64c9ff60bb9eab7b44b56fd"
    names = [f"shop_web-0_{UID}", f"kube-system_etcd-node1.example_{static}", "pods", "a_b", "a_b_c_d", "A_b_12"]
    root = write_tree(tmp_path, {f"var/log/pods/{name}/0.log": "" for name in names})
    assert running_pods(root) == {UID: Pod("shop", "web-0"), static: Pod("kube-system", "etcd-node1.example")}
    assert running_pods(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("name", "stable"),
    [
        ("web-0", "web-0"),
        ("web-7d4b9c6f58-x2x9k", "web-*"),
        ("kube-proxy-hx7cw", "kube-proxy-*"),
        ("backup-28473920-bz5kt", "backup-*"),
        ("etcd-node1", "etcd-node1"),
        ("virt-launcher-web-x2x9k", "web"),
        ("virt-launcher-web-01-x2x9k", "web-01"),
    ],
)
def test_names_stay_the_same_from_start_to_start(name: str, stable: str) -> None:
    assert Pod("shop", name).stable_name() == stable


def test_a_machine_is_called_as_its_pod_and_only_the_rest_of_a_long_name_is_believed() -> None:
    def called(name: str, guest: str) -> Membership:
        return of(CGROUP, {UID: Pod("shop", name)}, ["qemu-kvm", "-name", f"guest={guest}"])

    found = called("virt-launcher-web-x2x9k", "shop_web")
    assert (found.group, found.machine, found.namespace) == ("shop/web", True, "shop")
    for guest in ("shop_db", "bank_vault", "shop_web2", ""):
        assert called("virt-launcher-web-x2x9k", guest).group == "shop/web"
    cut = f"virt-launcher-{LONG}-"[:58] + "x2x9k"
    assert called(cut, f"shop_{LONG}").group == f"shop/{LONG}"
    assert called(cut, f"bank_{LONG}").group == called(cut, "shop_vault").group == f"shop/{LONG[:44]}"
    # What else runs in the pod of a machine is no machine.
    assert of(CGROUP, {UID: Pod("shop", "virt-launcher-web-x2x9k")}) == Membership(
        "shop/web", f"crio-{'0a' * 32}.scope", "", 107, systemd_path(CGROUP), False, "shop"
    )
    # And a monitor in any other pod is not KubeVirt's.
    other = of(CGROUP, {UID: Pod("shop", "kata-7d4b9c6f58-x2x9k")}, QEMU)
    assert (other.group, other.machine, other.namespace) == ("shop/kata-*", False, "shop")


def test_without_log_folders_a_machine_is_what_it_says_unless_two_say_so() -> None:
    found = of(CGROUP, {}, QEMU)
    assert (found.group, found.unsure, found.namespace) == ("shop/web", f"pod/{UID}", "shop")
    assert of(CGROUP, {}, ["qemu-kvm", "-name", "web"]).group == f"pod/{UID}"
