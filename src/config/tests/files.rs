//! Files, names, and what `check` prints.

use std::path::PathBuf;

use super::*;

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc/tng");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}

#[test]
fn every_example_is_accepted() {
    let files = examples();
    assert!(files.len() >= 9, "{files:?}");
    for file in files {
        let loaded = load(&file).unwrap_or_else(|report| panic!("{report}"));
        let output = render_check("tngd", &file, Ok(loaded), false);
        assert_eq!(output.code, 0);
        assert!(output.stdout.contains("limits"), "{}", output.stdout);
    }
}

#[test]
fn a_file_that_cannot_be_used_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let reason = |path: &Path| load(path).unwrap_err().diagnostics[0].reason;
    assert!(load(&file("good.toml", ingress("capture = [{ port = 1 }]").as_bytes())).is_ok());
    assert_eq!(reason(&dir.path().join("none.toml")), "file-missing");
    std::fs::create_dir(dir.path().join("dir.toml")).unwrap();
    assert_eq!(reason(&dir.path().join("dir.toml")), "file-is-directory");
    assert_eq!(reason(&file("Bad_Name.toml", b"")), "bad-name");
    assert_eq!(reason(&file("large.toml", &vec![b'#'; 1 + MAX_FILE as usize])), "file-too-large");
    let fifo = dir.path().join("fifo.toml");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(reason(&fifo), "file-not-regular");
    let report = load(&file("latin.toml", b"a = 1\nb = \"\xe9\"\n")).unwrap_err();
    let d = &report.diagnostics[0];
    assert_eq!((d.reason, d.line, d.column), ("not-utf8", Some(2), Some(6)));
}

#[test]
fn names_and_paths_lead_to_files() {
    // No test sets the variable: the process's environment is shared by all of them.
    assert_eq!(instance_path("egress").unwrap(), config_dir().join("egress.toml"));
    assert_eq!(instance_path("./x.toml").unwrap(), Path::new("./x.toml"));
    assert_eq!(instance_path("x.toml").unwrap(), Path::new("x.toml"));
    for bad in ["", "Egress", "a b", "/tmp/A.toml", "..", "-x"] {
        assert_eq!(instance_path(bad).unwrap_err().diagnostics[0].reason, "bad-name", "{bad}");
    }
}

#[test]
fn check_prints_the_plan_or_every_error() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.toml"), dir.path().join("b.toml"));
    std::fs::write(&a, mapping("ingress", "127.0.0.1:10001", "192.0.2.10:20001")).unwrap();
    std::fs::write(&b, mapping("ingress", "0.0.0.0:10001", "192.0.2.10:20001")).unwrap();
    let names = |files: &[&PathBuf]| files.iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
    let one = check_command("tngd", &names(&[&a]), false, |_| Vec::new());
    assert_eq!(one.code, 0, "{}", one.stderr);
    assert!(one.stdout.contains("127.0.0.1:10001") && one.stdout.contains("192.0.2.10:20001"), "{}", one.stdout);
    assert!(one.stderr.contains("warning: ") && one.stderr.contains("no_ra"), "{}", one.stderr);
    // Each file is right by itself; together they are not.
    let two = check_command("tngd", &names(&[&a, &b]), true, |_| Vec::new());
    assert_eq!(two.code, EX_CONFIG);
    let json: serde_json::Value = serde_json::from_str(&two.stdout).unwrap();
    assert_eq!(json["ok"], false);
    assert!(two.stdout.contains("listener-conflict"), "{}", two.stdout);
    let bad = check_command("tngd", &["No Name".to_owned()], false, |_| Vec::new());
    assert_eq!(bad.code, EX_CONFIG);
    assert!(bad.stderr.contains("not a legal instance name"), "{}", bad.stderr);
}

#[test]
fn the_directory_is_listed_without_what_is_no_instance() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["b.toml", "a.toml", "Bad.toml", ".hidden.toml", "notes.txt", "a.toml.dpkg-old"] {
        std::fs::write(dir.path().join(name), "").unwrap();
    }
    let names: Vec<_> = load::list_in(dir.path()).unwrap().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    // An illegal name is listed, so that checking it says what is wrong.
    assert_eq!(names, ["Bad.toml", "a.toml", "b.toml"]);
    assert!(load::list_in(&dir.path().join("none")).unwrap().is_empty());
    assert_eq!(load::list_in(&dir.path().join("a.toml")).unwrap_err().diagnostics[0].reason, "file-unreadable");
}

#[test]
fn the_manual_shows_working_files_and_every_key() {
    let manual = include_str!("../../../man/tng.toml.5");
    let examples: Vec<_> = manual.split(".EX\n").skip(1).map(|rest| rest.split(".EE\n").next().unwrap()).collect();
    assert_eq!(examples.len(), 2);
    examples.iter().for_each(|text| drop(good(text)));
    let policies = manual.split(".nf\npackage tng").skip(1).map(|rest| rest.split(".fi\n").next().unwrap());
    let read: Vec<_> =
        policies.map(|text| crate::attest::rego::Policy::compile(&format!("package tng{text}"))).collect();
    assert!(read.len() == 1 && read[0].is_ok());
    // The sources of the keys are the tables of the raw stage.
    let fields = include_str!("../raw.rs").split(['{', ',', '\n']).filter_map(|part| part.split_once(": "));
    for key in fields.map(|(key, _)| key.trim()).filter(|k| !k.is_empty() && !k.contains(['/', ' ', '('])) {
        assert!(manual.contains(key), "{key} is not in tng.toml(5)");
    }
}
