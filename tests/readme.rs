//! Every command in README.md is recognised, and every `blkcheck` command is run as written; long campaigns are cut to
//! two seconds. A command that this test cannot place fails it, so the README cannot drift.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use blkcheck_sim::target::loopdev::available;
use common::{BLKCHECK, root, skip, stderr, stdout};

/// What to do with a command of the README.
#[derive(Debug, PartialEq)]
enum Class {
    /// Run it like this, in a copy of what it needs.
    Run(Vec<String>),
    /// Root and loop devices first.
    RunOnLoop(Vec<String>),
    /// The daemon first; whether it has defects is not the README's matter.
    WithDaemon(Vec<String>),
    /// For people with a build: cargo itself is not tested here.
    Cargo,
}

/// Command lines of console blocks, comments removed, and inline code that starts with a command.
fn commands(readme: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    let mut prose = String::new();
    for line in readme.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            if let Some(command) = line.strip_prefix("$ ") {
                found.push(command.split(" #").next().unwrap_or(command).trim().to_owned());
            }
        } else {
            prose.push_str(line);
            prose.push(' ');
        }
    }
    assert!(!inside, "a code block is not closed");
    let inline = prose.split('`').skip(1).step_by(2);
    found.extend(
        inline
            .filter(|c| c.starts_with("blkcheck ") || c.starts_with("cargo "))
            .map(str::to_owned),
    );
    found
}

fn classify(command: &str) -> Result<Class, String> {
    let mut words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    let program = words.remove(0);
    if program == "cargo" {
        let known = ["run", "test", "+nightly"].contains(&words[0].as_str());
        return if known {
            Ok(Class::Cargo)
        } else {
            Err(format!("unknown cargo command: {command}"))
        };
    }
    // What a script does is tested in export.rs.
    if program == "python3" && words == ["repro.py"] {
        return Ok(Class::Cargo);
    }
    if program != "blkcheck" {
        return Err(format!("neither blkcheck nor cargo: {command}"));
    }
    if let Some(at) = words.iter().position(|w| w == "--for") {
        words[at + 1] = "2s".to_owned();
    }
    match words[0].as_str() {
        "run" if words.windows(2).any(|w| w == ["--on", "loop"]) => Ok(Class::RunOnLoop(words)),
        "compare" => Ok(Class::WithDaemon(words)),
        "run" if words.windows(2).any(|w| w == ["--on", "qemu"]) => Ok(Class::WithDaemon(words)),
        // The debug build under test is slower than the release build that the README speaks of.
        "run" | "replay" | "show" | "schema" | "export" => Ok(Class::Run(words)),
        "shrink" if words.contains(&"FILE".to_owned()) => Ok(Class::Run(words)),
        other => Err(format!("unknown subcommand {other}: {command}")),
    }
}

fn run(dir: &Path, words: &[String]) {
    // `shrink FILE` names no real file: the request is understood, the file is missing.
    let placeholder = words.contains(&"FILE".to_owned());
    run_expecting(dir, words, if placeholder { &[2] } else { &[0] });
}

fn run_expecting(dir: &Path, words: &[String], expected: &[i32]) {
    let output = Command::new(BLKCHECK)
        .current_dir(dir)
        .args(words)
        .output()
        .expect("the command starts");
    let placeholder = words.contains(&"FILE".to_owned());
    let code = output.status.code().expect("not killed");
    assert!(
        expected.contains(&code),
        "{words:?} ends with {code}: {}{}",
        stdout(&output),
        stderr(&output)
    );
    if placeholder {
        assert!(
            stderr(&output).contains("FILE: No such file"),
            "{words:?}: {}",
            stderr(&output)
        );
    } else {
        assert!(!output.stdout.is_empty(), "{words:?} says nothing");
    }
}

#[test]
fn every_command_in_the_readme_works() {
    let readme = fs::read_to_string(root().join("README.md")).expect("the README");
    let commands = commands(&readme);
    assert!(
        commands.iter().filter(|c| c.starts_with("blkcheck ")).count() >= 8,
        "{commands:?}"
    );
    let dir = tempfile::tempdir().expect("a directory");
    for folder in ["docs/examples", "docs/findings"] {
        let copies = dir.path().join(folder);
        fs::create_dir_all(&copies).expect("writable");
        for path in common::scenario_files(folder) {
            fs::copy(&path, copies.join(path.file_name().expect("a file"))).expect("writable");
        }
    }
    for command in commands {
        match classify(&command).unwrap_or_else(|e| panic!("{e}")) {
            Class::Cargo => eprintln!("known      {command}"),
            Class::Run(words) => {
                run(dir.path(), &words);
                eprintln!("ran        {command}");
            }
            Class::WithDaemon(words) => {
                if common::has_daemon(&command) {
                    run_expecting(dir.path(), &words, &[0, 1]);
                    eprintln!("ran        {command}");
                }
            }
            Class::RunOnLoop(mut words) => match available() {
                Err(reason) => skip(&command, &reason.to_string()),
                Ok(()) => {
                    // A loop device per image and run takes its time.
                    let seeds = words.iter().position(|w| w == "--seeds").expect("seeds");
                    words[seeds + 1] = "0..5".to_owned();
                    run(dir.path(), &words);
                    eprintln!("ran        {command}  (seeds 0..5)");
                }
            },
        }
    }
}

#[test]
fn files_that_the_readme_links_to_are_there() {
    let readme = fs::read_to_string(root().join("README.md")).expect("the README");
    let links: Vec<&str> = readme
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .collect();
    assert!(links.len() >= 4, "{links:?}");
    for link in links.into_iter().filter(|l| !l.contains("://")) {
        assert!(root().join(link).exists(), "README.md links to {link}");
    }
}

#[test]
fn unknown_commands_are_noticed() {
    assert!(classify("blkcheck frobnicate").is_err());
    assert!(classify("make all").is_err());
    assert!(classify("cargo install blkcheck").is_err());
    assert_eq!(
        classify("blkcheck run --for 5m"),
        Ok(Class::Run(["run", "--for", "2s"].map(str::to_owned).to_vec()))
    );
}
