"""manta.config: layers, origins, kinds of values, errors, derived paths, the token."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from manta import config as module
from manta.cli.main import main
from manta.config import Config, DaemonConfig, Loaded, Origin, find_token, items, load, parse_size, variable
from manta.errors import Denied, Invalid


@pytest.fixture(autouse=True)
def no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_FILE", tmp_path / "etc/manta/config.toml")


def loaded(
    tmp_path: Path,
    *,
    file: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    user_id: int = 0,
) -> Loaded:
    path = None
    if file is not None:
        path = tmp_path / "given.toml"
        path.write_text(file)
    return load(flags, file=path, environ={"HOME": str(tmp_path), **(environ or {})}, user_id=user_id)


def refusal(tmp_path: Path, **layers: object) -> str:
    with pytest.raises(Invalid) as caught:
        loaded(tmp_path, **layers)  # type: ignore[arg-type]
    return caught.value.message


def test_every_setting_has_a_kind_and_a_default_that_it_allows() -> None:
    assert [key for key, _ in items(Config())] == list(module.KEYS)
    for key, value in items(Config()):
        assert module._KINDS[key].read_from(value, key, Origin("flag", key), Path("/")) == value


def test_defaults_are_those_of_the_sections_for_root(tmp_path: Path) -> None:
    result = loaded(tmp_path)
    assert result.config == Config()
    assert {origin.kind for origin in result.origins.values()} == {"default"}


def test_defaults_of_other_users_are_below_their_home(tmp_path: Path) -> None:
    result = loaded(tmp_path, user_id=1000, environ={"XDG_RUNTIME_DIR": "/run/user/1000"}).config
    assert result.cache.dir == tmp_path / ".cache/manta"
    assert result.daemon.runtime_dir == Path("/run/user/1000/manta")
    assert not loaded(tmp_path, user_id=1000).is_explicit("cache.dir")


def test_without_a_login_session_a_user_gets_a_runtime_directory_of_their_own(tmp_path: Path) -> None:
    assert loaded(tmp_path, user_id=1000).config.daemon.runtime_dir.name == "manta-1000"


def test_each_layer_beats_the_one_below_it(tmp_path: Path) -> None:
    file = "[fetch]\nworkers = 3\nconnections = 3\n[hub]\ntimeout_s = 3"
    environ = {"MANTA_FETCH_WORKERS": "4", "MANTA_FETCH_CONNECTIONS": "4"}
    result = loaded(tmp_path, file=file, environ=environ, flags={"fetch.workers": "5"})
    assert (result.config.fetch.workers, result.config.fetch.connections, result.config.hub.timeout_s) == (5, 4, 3.0)
    assert result.origins["fetch.workers"] == Origin("flag", "--set fetch.workers")
    assert result.origins["fetch.connections"] == Origin("environment", "MANTA_FETCH_CONNECTIONS")
    assert result.origins["hub.timeout_s"] == Origin("file", str(tmp_path / "given.toml"))
    assert result.origins["fetch.stall_s"].kind == "default"


def test_a_users_file_beats_the_systems_and_a_named_file_replaces_both(tmp_path: Path) -> None:
    for path, text in (
        (module.SYSTEM_FILE, "[fetch]\nworkers = 3\nconnections = 3"),
        (tmp_path / ".config/manta/config.toml", "[fetch]\nworkers = 4"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    fetch = loaded(tmp_path).config.fetch
    assert (fetch.workers, fetch.connections) == (4, 3)
    assert loaded(tmp_path, file="").config.fetch == Config().fetch
    (tmp_path / "other.toml").write_text("[fetch]\nworkers = 6")
    assert loaded(tmp_path, environ={"MANTA_CONFIG": "~/other.toml"}).config.fetch.workers == 6


def test_hf_variables_are_honoured_below_mantas_own(tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": "https://mirror.example/", "HF_HUB_OFFLINE": "1"}
    result = loaded(tmp_path, environ=environ, file='[hub]\nendpoint = "https://file.example"')
    assert result.config.hub.endpoint == "https://mirror.example"
    assert result.config.hub.offline
    assert result.origins["hub.endpoint"].name == "HF_ENDPOINT"
    ours = loaded(tmp_path, environ={**environ, "MANTA_HUB_ENDPOINT": "http://own", "MANTA_HUB_OFFLINE": "no"})
    assert ours.config.hub.endpoint == "http://own"
    assert not ours.config.hub.offline


def test_huggingface_reads_an_odd_offline_switch_as_off_and_so_do_we(tmp_path: Path) -> None:
    assert not loaded(tmp_path, environ={"HF_HUB_OFFLINE": "maybe"}).config.hub.offline


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1024", 1024),
        ("500GiB", 500 * 1024**3),
        ("500Gi", 500 * 1024**3),
        ("20GB", 20 * 1000**3),
        ("20G", 20 * 1000**3),
        ("1.5T", 1_500_000_000_000),
        ("64 kib", 65536),
        ("2P", 2 * 1000**5),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "-1", "many", "5X", "1e9", "GiB", "1..5G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Invalid, match="expected bytes, or a size like"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("20", 20.0), ("500ms", 0.5), ("2m", 120.0), ("1.5 s", 1.5)])
def test_durations(tmp_path: Path, text: str, seconds: float) -> None:
    assert loaded(tmp_path, flags={"hub.timeout_s": text}).config.hub.timeout_s == seconds


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cache.size", "a lot", "500GiB"),
        ("cache.size", True, "500GiB"),
        ("cache.size", -5, "500GiB"),
        ("cache.dir", "", "a directory's path"),
        ("cache.dir", 5, "a directory's path"),
        ("hub.endpoint", "huggingface.co", "https://huggingface.co"),
        ("hub.endpoint", "ftp://x", "https://huggingface.co"),
        ("hub.endpoint", "http://x:port", "https://huggingface.co"),
        ("hub.endpoint", 3, "https://huggingface.co"),
        ("hub.offline", "perhaps", "true or false"),
        ("hub.timeout_s", "soon", "seconds from 0.1 to 600"),
        ("hub.timeout_s", 0, "seconds from 0.1 to 600"),
        ("hub.timeout_s", True, "seconds from 0.1 to 600"),
        ("fetch.workers", 17, "from 1 to 16"),
        ("fetch.workers", "two", "from 1 to 16"),
        ("fetch.workers", 2.5, "from 1 to 16"),
        ("fuse.session", "kernle", "auto"),
        ("daemon.log_level", "loud", "debug, info, warning or error"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(tmp_path: Path, key: str, value: object, words: str) -> None:
    message = refusal(tmp_path, flags={key: value})
    assert repr(value) in message
    assert words in message


def test_a_refusal_names_the_variable_or_the_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, environ={"MANTA_FETCH_WORKERS": "99"}).startswith("MANTA_FETCH_WORKERS is '99'")
    message = refusal(tmp_path, file="[fetch]\nworkers = 99")
    assert message.startswith(f"fetch.workers in {tmp_path / 'given.toml'} is 99")


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "did you mean 'MANTA_CACHE_DIR'" in refusal(tmp_path, environ={"MANTA_CACHEDIR": "/x"})
    assert "no setting" in refusal(tmp_path, environ={"MANTA_CACHE_COLOUR": "red"})
    assert "did you mean 'workers'" in refusal(tmp_path, file="[fetch]\nworker = 2")
    assert "did you mean 'cache'" in refusal(tmp_path, file="[cach]\ndir = 'x'")
    assert "no section" in refusal(tmp_path, file="cache = 5")
    assert "did you mean 'cache.dir'" in refusal(tmp_path, flags={"cache.dri": "/x"})


def test_variables_that_are_not_settings_are_left_alone(tmp_path: Path) -> None:
    # What Kubernetes sets in a pod for Services named "manta" and "manta-hub", and what others may have.
    environ = {
        "MANTA_SERVICE_HOST": "10.0.0.1",
        "MANTA_PORT": "tcp://10.0.0.1:80",
        "MANTA_HUB_SERVICE_HOST": "10.0.0.1",
        "MANTA_HUB_SERVICE_PORT_HTTP": "80",
        "MANTA_HUB_PORT_80_TCP_ADDR": "10.0.0.1",
        "MANTA_SERVE_TOKEN": "x",
        "MANTA_SOMETHING_ELSE": "1",
    }
    assert loaded(tmp_path, environ=environ).config == Config()


def test_a_file_that_is_named_must_be_there_and_be_toml(tmp_path: Path) -> None:
    assert "MANTA_CONFIG names does not exist" in refusal(tmp_path, environ={"MANTA_CONFIG": "/no/such.toml"})
    assert "is not TOML" in refusal(tmp_path, file="[cache\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(tmp_path, environ={"MANTA_CONFIG": str(tmp_path / "binary.toml")})


def test_paths_become_absolute_where_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    assert loaded(tmp_path, flags={"cache.dir": "here"}).config.cache.dir == Path("/usr/here")
    assert loaded(tmp_path, file='[cache]\ndir = "here"').config.cache.dir == tmp_path / "here"
    assert loaded(tmp_path, environ={"MANTA_CACHE_DIR": "~/here"}).config.cache.dir == tmp_path / "here"


def test_the_environment_hands_over_every_value(tmp_path: Path) -> None:
    first = loaded(
        tmp_path,
        flags={"cache.size": "5GiB", "hub.offline": True, "hub.timeout_s": "500ms", "cache.dir": "/some/where"},
    ).config
    module.SYSTEM_FILE.parent.mkdir(parents=True)
    module.SYSTEM_FILE.write_text("broken [")
    environ = {"HF_ENDPOINT": "http://elsewhere", "HF_HUB_OFFLINE": "0", **first.environment()}
    assert loaded(tmp_path, environ=environ).config == first
    assert variable("cache.size") == "MANTA_CACHE_SIZE"


# Derived paths -------------------------------------------------------------------------------------------------------


def test_one_instance_directory_for_every_spelling_of_a_cache_directory(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    spellings = [real, link, tmp_path / "real/../real"]
    folders = {loaded(tmp_path, flags={"cache.dir": s}).config.instance_dir for s in spellings}
    assert len(folders) == 1
    assert folders != {loaded(tmp_path, flags={"cache.dir": tmp_path / "other"}).config.instance_dir}
    (folder,) = folders
    assert folder.parent == Config().daemon.runtime_dir
    assert len(folder.name) == 12


def test_a_socket_path_that_linux_cannot_take_is_refused(tmp_path: Path) -> None:
    deep = replace(Config(), daemon=DaemonConfig(runtime_dir=tmp_path / ("x" * 100)))
    with pytest.raises(Invalid, match="--runtime-dir"):
        _ = deep.socket_path
    assert Config().socket_path == Config().instance_dir / "control.sock"


def test_the_instance_directory_is_made_for_its_owner_only(tmp_path: Path) -> None:
    config = replace(Config(), daemon=DaemonConfig(runtime_dir=tmp_path / "run"))
    assert config.make_instance_dir() == config.make_instance_dir() == config.instance_dir
    assert stat.S_IMODE(config.instance_dir.stat().st_mode) == 0o700
    assert config.log_path.parent == config.mount_root.parent == config.instance_dir


def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    config = replace(Config(), daemon=DaemonConfig(runtime_dir=tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(Denied, match="writable by others"):
        config.make_instance_dir()
    (tmp_path / "run").chmod(0o1777)  # sticky, as /tmp: nobody can replace what is ours
    config.make_instance_dir()
    config.instance_dir.chmod(0o770)
    with pytest.raises(Denied, match="writable by others"):
        config.make_instance_dir()
    config.instance_dir.rmdir()
    config.instance_dir.symlink_to(tmp_path)
    with pytest.raises(Denied, match="belongs to someone else"):
        config.make_instance_dir()


def test_a_runtime_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = replace(Config(), daemon=DaemonConfig(runtime_dir=tmp_path / "file/run"))
    with pytest.raises(Denied, match="cannot be made"):
        config.make_instance_dir()


# The token -----------------------------------------------------------------------------------------------------------


def test_the_token_is_found_where_hf_tools_find_it(tmp_path: Path) -> None:
    saved = tmp_path / ".cache/huggingface/token"
    saved.parent.mkdir(parents=True)
    home = {"HOME": str(tmp_path)}
    assert find_token(home) is None
    saved.write_text("hf_saved\n")
    assert find_token(home) == ("hf_saved", str(saved))
    (tmp_path / "own").write_text("hf_own")
    assert find_token({**home, "HF_TOKEN_PATH": "~/own"}) == ("hf_own", str(tmp_path / "own"))
    assert find_token({**home, "HF_HOME": str(tmp_path / "elsewhere")}) is None
    assert find_token({**home, "HF_TOKEN": " hf_env\n"}) == ("hf_env", "HF_TOKEN")
    assert find_token({**home, "HF_TOKEN": ""}) == ("hf_saved", str(saved))
    assert find_token({**home, "HF_TOKEN": "hf_env", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}) is None


def test_the_token_agrees_with_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, get_token

    saved = tmp_path / "token"
    saved.write_text("hf_saved\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(saved))
    for value in ("hf_env", "", " hf_env \n"):
        monkeypatch.setenv("HF_TOKEN", value)
        found = find_token({**os.environ, "HF_TOKEN_PATH": str(saved)})
        assert found is not None
        assert found.value == get_token()


def test_a_token_never_shows_in_its_repr() -> None:
    token = find_token({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(token)
    assert "HF_TOKEN" in repr(token)


@pytest.mark.parametrize(
    ("text", "host", "port", "path"),
    [
        ("127.0.0.1:9401", "127.0.0.1", 9401, ""),
        (" localhost:1 ", "localhost", 1, ""),
        ("[::1]:65535", "::1", 65535, ""),
        ("0.0.0.0:80", "0.0.0.0", 80, ""),
        ("unix:/run/manta/metrics.sock", "", 0, "/run/manta/metrics.sock"),
    ],
)
def test_metrics_addresses(tmp_path: Path, text: str, host: str, port: int, path: str) -> None:
    shown = loaded(tmp_path, flags={"daemon.metrics": text}).config.daemon.metrics
    assert shown == text.strip()
    assert module.parse_address(shown) == module.ListenAddress(host, port, path)


def test_no_metrics_address_is_off() -> None:
    assert module.parse_address("") is None


def test_brackets_fit_the_addresses_of_both_families() -> None:
    assert module.parse_address("[10.0.0.1]:9402") == module.ListenAddress("10.0.0.1", 9402)
    assert str(module.parse_address("[10.0.0.1]:9402")) == "10.0.0.1:9402"


@pytest.mark.parametrize("text", ["[::1:80", "[10.0.0.1:80", "10.0.0.1]:80", "[10.0.1]:80"])
def test_brackets_come_in_pairs_and_around_addresses(text: str) -> None:
    with pytest.raises(ValueError):
        module.parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["9401", ":9401", "host", "host:", "host:0", "host:70000", "host:x", "::1:80", "[host]:80", "unix:", "unix:a"],
)
def test_what_is_no_metrics_address_is_refused(tmp_path: Path, text: str) -> None:
    assert "daemon.metrics" in refusal(tmp_path, file=f'[daemon]\nmetrics = "{text}"')
    assert "HOST:PORT" in refusal(tmp_path, environ={"MANTA_DAEMON_METRICS": text})


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("", ("", ())),
        (" static:a:1, 10.0.0.2:9402 ,[fd00::1]:65535,", ("static", ("a:1", "10.0.0.2:9402", "[fd00::1]:65535"))),
        ("dns:manta-nodes.ml.svc.cluster.local:9402", ("dns", ("manta-nodes.ml.svc.cluster.local:9402",))),
        ("kubernetes:ml/manta-nodes", ("kubernetes", ("ml", "manta-nodes"))),
    ],
)
def test_peers(tmp_path: Path, text: str, meaning: tuple[str, tuple[str, ...]]) -> None:
    shown = loaded(tmp_path, flags={"swarm.peers": text}).config.swarm.peers
    assert shown == text.strip()
    assert module.parse_peers(shown) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "static", "static:", "static:host", "static:host:0", "static:unix:/x", "static:a/b:1", "static:a@b:1", "static:a b:1", "dns:a",
        "dns:a:1,b:2", "kubernetes:ml", "kubernetes", "kubernetes:ML/x", "kubernetes:a/b/c", "kubernetes:../x", "host:1", "https://a:1",
        "static:" + "a:1," * 20_000,
    ],
)  # fmt: skip
def test_what_names_no_peers_is_refused(tmp_path: Path, text: str) -> None:
    said = refusal(tmp_path, flags={"swarm.peers": text})
    assert said.startswith("--peers is ")
    assert '"static:HOST:PORT,...", "dns:NAME:PORT" or "kubernetes:NAMESPACE/SERVICE"' in said


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("swarm.listen", "", "HOST:PORT"),
        ("swarm.listen", "unix:/run/x", "HOST:PORT"),
        ("swarm.key_file", "relative/key", "absolute path"),
        ("swarm.tls_name", "a b", "host name"),
        ("swarm.slots", "0", "1 to 256"),
        ("swarm.downloads", "257", "1 to 256"),
        ("swarm.upload_rate", "-1", "size"),
        ("swarm.share", "some", "all or public"),
    ],
)
def test_a_bad_value_for_the_swarm_is_refused(tmp_path: Path, key: str, value: str, words: str) -> None:
    assert words in refusal(tmp_path, flags={key: value})


def test_the_swarms_key_is_no_setting_and_is_never_shown(tmp_path: Path) -> None:
    result = loaded(tmp_path, environ={"MANTA_SWARM_KEY": "secret-key-of-the-swarm"})
    assert "secret-key" not in f"{result} {result.config.environment()}"
    assert "key" not in {key.partition(".")[2] for key in module.KEYS}
    with pytest.raises(Invalid, match=r"no setting"):
        load({"swarm.key": "secret-key-of-the-swarm"}, environ={"HOME": str(tmp_path)})


def test_manta_config_does_not_print_the_swarms_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANTA_SWARM_KEY", "secret-key-of-the-swarm")
    assert main(["config"]) == 0
    shown = capsys.readouterr()
    assert "swarm.peers" in shown.out
    assert "secret-key" not in shown.out + shown.err
