"""The messages of CSI and of the kubelet's plugin registration as a kubelet writes them, here and only here.

They are defined apart from the driver's own .proto on purpose: a field number that the driver has wrong is then seen by every test. The
numbers are those of the CSI specification 1.12 (csi.proto) and of pluginregistration/v1; unlike the driver's subset these have every field
that a kubelet of 1.36 can set. They live in a descriptor pool of their own, so that both fit into one process. Used by
`manta.testing.kubelet` and the tests of the driver. Needs protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

_FIELD = descriptor_pb2.FieldDescriptorProto

_ENUMS = {
    "AccessMode": (
        "UNKNOWN",
        "SINGLE_NODE_WRITER",
        "SINGLE_NODE_READER_ONLY",
        "MULTI_NODE_READER_ONLY",
        "MULTI_NODE_SINGLE_WRITER",
        "MULTI_NODE_MULTI_WRITER",
        "SINGLE_NODE_SINGLE_WRITER",
        "SINGLE_NODE_MULTI_WRITER",
    ),
    "Unit": ("UNKNOWN_UNIT", "BYTES", "INODES"),
    "NodeCapability": (
        "UNKNOWN_CAPABILITY",
        "STAGE_UNSTAGE_VOLUME",
        "GET_VOLUME_STATS",
        "EXPAND_VOLUME",
        "VOLUME_CONDITION",
        "SINGLE_NODE_MULTI_WRITER_CAPABILITY",
        "VOLUME_MOUNT_GROUP",
        "GET_ID",
    ),
    "Service": (
        "UNKNOWN_SERVICE",
        "CONTROLLER_SERVICE",
        "VOLUME_ACCESSIBILITY_CONSTRAINTS",
        "GROUP_CONTROLLER_SERVICE",
    ),
}
"""Values in the order of their numbers, from 0. Their names must differ within the package, and are not on the wire: so some are not the
specification's."""

ACCESS_MODES = _ENUMS["AccessMode"][1:]

_CSI: dict[str, str] = {
    "GetPluginInfoRequest": "",
    "GetPluginInfoResponse": "name=1:string vendor_version=2:string manifest=3:map",
    "GetPluginCapabilitiesRequest": "",
    "GetPluginCapabilitiesResponse": "capabilities=1:PluginCapability*",
    "PluginCapability": "service=1:PluginService",
    "PluginService": "type=1:Service",
    "ProbeRequest": "",
    "ProbeResponse": "ready=1:.google.protobuf.BoolValue",
    "NodeGetInfoRequest": "",
    "NodeGetInfoResponse": "node_id=1:string max_volumes_per_node=2:int64 accessible_topology=3:Topology",
    "Topology": "segments=1:map",
    "NodeGetCapabilitiesRequest": "",
    "NodeGetCapabilitiesResponse": "capabilities=1:NodeServiceCapability*",
    "NodeServiceCapability": "rpc=1:NodeRpc",
    "NodeRpc": "type=1:NodeCapability",
    "NodePublishVolumeRequest": (
        "volume_id=1:string publish_context=2:map staging_target_path=3:string target_path=4:string"
        " volume_capability=5:VolumeCapability readonly=6:bool secrets=7:map volume_context=8:map"
    ),
    "NodePublishVolumeResponse": "",
    "VolumeCapability": "block=1:BlockVolume mount=2:MountVolume access_mode=3:VolumeAccessMode",
    "BlockVolume": "",
    "MountVolume": "fs_type=1:string mount_flags=2:string* volume_mount_group=3:string",
    "VolumeAccessMode": "mode=1:AccessMode",
    "NodeUnpublishVolumeRequest": "volume_id=1:string target_path=2:string",
    "NodeUnpublishVolumeResponse": "",
    "NodeGetVolumeStatsRequest": "volume_id=1:string volume_path=2:string staging_target_path=3:string",
    "NodeGetVolumeStatsResponse": "usage=1:VolumeUsage* volume_condition=2:VolumeCondition",
    "VolumeUsage": "available=1:int64 total=2:int64 used=3:int64 unit=4:Unit",
    "VolumeCondition": "abnormal=1:bool message=2:string",
    "NodeStageVolumeRequest": "volume_id=1:string staging_target_path=3:string volume_capability=4:VolumeCapability",
    "NodeStageVolumeResponse": "",
}
"""Fields as NAME=NUMBER:TYPE; a star: repeated; "map": from string to string. Of oneofs only the numbers matter on the wire."""

_REGISTRATION: dict[str, str] = {
    "InfoRequest": "",
    "PluginInfo": "type=1:string name=2:string endpoint=3:string supported_versions=4:string*",
    "RegistrationStatus": "plugin_registered=1:bool error=2:string",
    "RegistrationStatusResponse": "",
}

_SCALARS = {"string": _FIELD.TYPE_STRING, "bool": _FIELD.TYPE_BOOL, "int64": _FIELD.TYPE_INT64}

_SERVICES = {
    "csi.v1.Identity": ("GetPluginInfo", "GetPluginCapabilities", "Probe"),
    "csi.v1.Node": (
        "NodeGetInfo",
        "NodeGetCapabilities",
        "NodePublishVolume",
        "NodeUnpublishVolume",
        "NodeGetVolumeStats",
        "NodeStageVolume",
    ),
}


@dataclass(frozen=True, slots=True)
class Method:
    """How a call is made: its path on the connection, and what turns fields into bytes and bytes into a message."""

    path: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    request: type[Any]


@cache
def method(name: str) -> Method:
    """`name` is that of a call, such as "NodePublishVolume" or "GetInfo" of the registration. Raises KeyError."""
    service, request, response = _calls()[name]
    asked, answered = message(request), message(response)
    return Method(f"/{service}/{name}", asked.SerializeToString, answered.FromString, asked)


@cache
def message(name: str) -> type[Any]:
    """The class of a message, such as "csi.v1.NodePublishVolumeRequest". Raises KeyError where there is none of that name."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(name))


def _calls() -> dict[str, tuple[str, str, str]]:
    calls = {
        name: (service, f"csi.v1.{name}Request", f"csi.v1.{name}Response")
        for service, names in _SERVICES.items()
        for name in names
    }
    registration, package = "pluginregistration.Registration", "pluginregistration"
    calls["GetInfo"] = (registration, f"{package}.InfoRequest", f"{package}.PluginInfo")
    calls["NotifyRegistrationStatus"] = (
        registration,
        f"{package}.RegistrationStatus",
        f"{package}.RegistrationStatusResponse",
    )
    return calls


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(_file("csi.v1", _CSI).SerializeToString())
    pool.AddSerializedFile(_file("pluginregistration", _REGISTRATION).SerializeToString())
    return pool


def _file(package: str, messages: dict[str, str]) -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"manta/testing/{package}.proto",
        package=package,
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto"],
    )
    if package == "csi.v1":
        for name, values in _ENUMS.items():
            enum = file.enum_type.add(name=name)
            for number, value in enumerate(values):
                enum.value.add(name=value, number=number)
    for name, fields in messages.items():
        _fill(file.message_type.add(name=name), package, fields)
    return file


def _fill(entry: descriptor_pb2.DescriptorProto, package: str, fields: str) -> None:
    for definition in fields.split():
        name, _, rest = definition.partition("=")
        number, _, kind = rest.partition(":")
        field = entry.field.add(name=name, number=int(number), label=_FIELD.LABEL_OPTIONAL)
        if kind.endswith("*"):
            field.label, kind = _FIELD.LABEL_REPEATED, kind[:-1]
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
        elif kind in _ENUMS:
            field.type, field.type_name = _FIELD.TYPE_ENUM, f".{package}.{kind}"
        elif kind == "map":
            # What protoc makes of a map: a repeated message of a key and a value. Its name is the field's in camel case.
            pair = entry.nested_type.add(name="".join(word.title() for word in name.split("_")) + "Entry")
            pair.options.map_entry = True
            for place, part in enumerate(("key", "value"), 1):
                pair.field.add(name=part, number=place, label=_FIELD.LABEL_OPTIONAL, type=_FIELD.TYPE_STRING)
            field.label, field.type = _FIELD.LABEL_REPEATED, _FIELD.TYPE_MESSAGE
            field.type_name = f".{package}.{entry.name}.{pair.name}"
        else:
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, kind if kind[0] == "." else f".{package}.{kind}"
