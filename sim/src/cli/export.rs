//! `blkcheck export`: a stand-alone script that replays a scenario on a real QEMU.

use super::args::{ExportArgs, ExportStorage};
use super::{CliError, Found, load, print_out};
use crate::export::{ExportError, Options, Storage, export};

pub(super) fn run(args: &ExportArgs) -> Result<Found, CliError> {
    let scenario = load(&args.file)?;
    let storage = match args.storage {
        ExportStorage::Auto => None,
        ExportStorage::File => Some(Storage::File),
        ExportStorage::Nbd => Some(Storage::Nbd),
        ExportStorage::Gate => Some(Storage::Gate),
    };
    let name = args
        .file
        .file_stem()
        .map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    let options = Options {
        storage,
        qemu: args.qemu.as_deref(),
        command: &command(args),
        name: &name,
    };
    let script = export(&scenario, &options).map_err(|error| match error {
        ExportError::Unusable(text) => CliError::Environment(text),
        other => CliError::Request(format!("{}: {other}", args.file.display())),
    })?;
    std::fs::write(&args.output, script).map_err(|source| CliError::File {
        path: args.output.display().to_string(),
        source,
    })?;
    print_out(&format!("python3 {}", args.output.display()));
    Ok(Found::Nothing)
}

/// As it was asked for, without where it goes.
fn command(args: &ExportArgs) -> String {
    let storage = match args.storage {
        ExportStorage::Auto => "",
        ExportStorage::File => " --storage file",
        ExportStorage::Nbd => " --storage nbd",
        ExportStorage::Gate => " --storage gate",
    };
    format!("blkcheck export {}{storage}", args.file.display())
}
