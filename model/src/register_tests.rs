//! Tests of the registers.

use super::*;

fn disk() -> Registers {
    Registers::new([7])
}

fn read(disk: &mut Registers, saw: Value) -> Result<(), Violation> {
    let read = disk.begin(Effect::Read, 0..1);
    disk.end_read(read, &[saw])
}

#[test]
fn a_lone_write_is_seen() {
    let mut disk = disk();
    read(&mut disk, 7).unwrap();
    let write = disk.begin(Effect::Write(8), 0..1);
    disk.end(write, true);
    read(&mut disk, 8).unwrap();
    assert_eq!(read(&mut disk, 7).unwrap_err().allowed, [8]);
}

#[test]
fn an_open_write_may_be_seen_but_not_taken_back() {
    let mut disk = disk();
    let write = disk.begin(Effect::Write(8), 0..1);
    assert_eq!(disk.possible(0), [7, 8]);
    read(&mut disk, 7).unwrap();
    read(&mut disk, 8).unwrap();
    assert_eq!(read(&mut disk, 7).unwrap_err().allowed, [8]);
    disk.end(write, true);
    assert_eq!(disk.possible(0), [8]);
}

#[test]
fn overlapping_writes_end_in_either_order_until_a_read_tells() {
    let mut disk = disk();
    let a = disk.begin(Effect::Write(8), 0..1);
    let b = disk.begin(Effect::Write(9), 0..1);
    disk.end(b, true);
    disk.end(a, true);
    assert_eq!(disk.possible(0), [8, 9]);
    read(&mut disk, 9).unwrap();
    assert_eq!(disk.possible(0), [9]);
}

#[test]
fn a_failed_write_may_come_late_and_once() {
    let mut disk = disk();
    let failed = disk.begin(Effect::Write(8), 0..1);
    disk.end(failed, false);
    let write = disk.begin(Effect::Write(9), 0..1);
    disk.end(write, true);
    assert_eq!(disk.possible(0), [8, 9]);
    read(&mut disk, 8).unwrap();
    assert_eq!(read(&mut disk, 9).unwrap_err().allowed, [8]);
    let write = disk.begin(Effect::Write(10), 0..1);
    disk.end(write, true);
    assert_eq!(disk.possible(0), [10], "it has taken effect already");
}

#[test]
fn a_discard_leaves_old_or_zero_and_sticks_to_it() {
    let mut disk = disk();
    let discard = disk.begin(Effect::Discard, 0..1);
    disk.end(discard, true);
    assert_eq!(disk.possible(0), [0, 7]);
    read(&mut disk, 7).unwrap();
    assert_eq!(disk.possible(0), [7]);
}

#[test]
fn grains_are_independent_and_quiet_ones_stay_plain() {
    let mut disk = Registers::new([1, 2, 3]);
    let wide = disk.begin(Effect::Write(9), 0..3);
    let narrow = disk.begin(Effect::Read, 1..2);
    assert!(disk.registers[0].busy.is_none() && disk.registers[1].busy.is_some());
    disk.end_read(narrow, &[2]).unwrap();
    disk.end(wide, true);
    assert!(
        disk.registers
            .iter()
            .all(|register| register.busy.is_none() && register.value == 9)
    );
}

#[test]
fn giving_up_accepts_everything_and_says_so() {
    let mut disk = disk();
    for stamp in 0..100 {
        let write = disk.begin(Effect::Write(100 + stamp), 0..1);
        disk.end(write, false);
    }
    assert_eq!(disk.given_up(), 1);
    read(&mut disk, 12345).unwrap();
}

#[test]
fn a_grain_that_was_not_observed_decides_nothing() {
    let mut disk = Registers::new([1, 1]);
    let write = disk.begin(Effect::Write(2), 0..2);
    let read = disk.begin(Effect::Read, 0..2);
    disk.observe(read, [Some(2), None].into_iter(), |v| panic!("{v:?}"));
    assert_eq!((disk.possible(0), disk.possible(1)), (vec![2], vec![1, 2]));
    disk.end(write, true);
    let read = disk.begin(Effect::Read, 0..2);
    let mut wrong = Vec::new();
    disk.observe(read, [Some(7), Some(8)].into_iter(), |v| {
        wrong.push((v.grain, v.saw, v.allowed));
    });
    assert_eq!(wrong, [(0, 7, vec![2]), (1, 8, vec![2])]);
}

#[test]
fn a_shift_replaces_what_no_open_write_has() {
    let mut disk = Registers::new([1, 1, 1]);
    disk.shift(0, &[5], true);
    assert_eq!(disk.possible(0), [5]);
    // A write under way wins over it, and must not be lost by it.
    let write = disk.begin(Effect::Write(7), 1..2);
    let read = disk.begin(Effect::Read, 1..2);
    disk.shift(1, &[5], true);
    assert_eq!(disk.possible(1), [5, 7]);
    disk.end(write, true);
    assert_eq!(disk.possible(1), [7]);
    assert_eq!(disk.end_read(read, &[1]), Ok(()), "begun before");
    // One of several, and what it was: the first who looks decides.
    disk.shift(2, &[3, 4], false);
    assert_eq!(disk.possible(2), [1, 3, 4]);
    let read = disk.begin(Effect::Read, 2..3);
    assert_eq!(disk.end_read(read, &[4]), Ok(()));
    assert_eq!(disk.possible(2), [4]);
    disk.resize(5);
    assert_eq!(disk.possible(4), [0]);
}

#[test]
fn a_request_loses_the_grains_that_are_cut_off() {
    let mut disk = Registers::new([0; 4]);
    let write = disk.begin(Effect::Write(7), 1..4);
    let read = disk.begin(Effect::Read, 2..4);
    let gone = disk.begin(Effect::Read, 3..4);
    disk.resize(3);
    disk.resize(4);
    assert_eq!(disk.end_read(read, &[7, 5]), Ok(()), "grain 3 is another one now");
    assert_eq!(disk.end_read(gone, &[5]), Ok(()));
    disk.end(write, true);
    assert_eq!((disk.possible(2), disk.possible(3)), (vec![7], vec![0]));
}
