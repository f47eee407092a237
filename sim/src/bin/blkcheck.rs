//! The `blkcheck` command; everything is in the library.

fn main() -> std::process::ExitCode {
    blkcheck_sim::cli::main()
}
