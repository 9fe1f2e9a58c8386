//! The lists of system calls. What stands in them is numbers of this architecture; what they mean is in section 2 of the manual.

use libc::c_long;

/// What serving takes, and what the C libraries and Rust's do for it: all of it on descriptors and memory that are there
/// already. The kernel keeps those that are allowed whatever their arguments in a bitmap, so they cost nearly nothing.
pub(crate) const SERVING: &[c_long] = &[
    // The event loops.
    libc::SYS_io_uring_enter,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_close,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    // Files.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    // Clients that connect to sockets that are listened on, and the service manager.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads. `clone3` gets an answer of its own.
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_setpriority,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    // Who and when.
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    // Going to the background.
    libc::SYS_setsid,
    libc::SYS_chdir,
];

/// Older calls that only this architecture still has.
#[cfg(target_arch = "x86_64")]
pub(crate) const SERVING_HERE: &[c_long] = &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_dup2];
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const SERVING_HERE: &[c_long] = &[];

/// What a storage daemon never does, whatever its clients ask for: other programs, other processes, the kernel's own set-up.
pub(crate) const NEVER: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_personality,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_open_by_handle_at,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// What not every architecture or C library has a name for: older ways to make a process, and `kexec_file_load`.
#[cfg(target_arch = "x86_64")]
pub(crate) const NEVER_HERE: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_kexec_file_load,
];
/// By this bit of its number a call of the x32 ABI differs from that of x86-64, where the kernel serves both: to a filter they are
/// one architecture. Source: `__X32_SYSCALL_BIT` of `arch/x86/include/uapi/asm/unistd.h`.
#[cfg(target_arch = "x86_64")]
pub(crate) const X32: Option<c_long> = Some(0x4000_0000);
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const X32: Option<c_long> = None;
/// Those of [`NEVER`] that have numbers of their own there: `execve`, `ptrace`, `kexec_load`, `process_vm_readv`,
/// `process_vm_writev`, `execveat`. Source: `arch/x86/entry/syscalls/syscall_64.tbl`.
pub(crate) const NEVER_X32: &[c_long] = &[520, 521, 528, 539, 540, 545];
/// `kexec_file_load` of `include/uapi/asm-generic/unistd.h`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const NEVER_HERE: &[c_long] = &[294];
