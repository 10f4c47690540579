// Program csi-node-driver-registrar tells kubelet of a CSI driver, in place of the sidecar of that name, whose module the Go
// proxy does not serve: the same flags as far as our manifests use them, the same conversation with kubelet and driver.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

type registrar struct {
	registration.UnimplementedRegistrationServer
	name, endpoint string
	refused        chan string
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              r.name,
		Endpoint:          r.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, status *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	fmt.Println("kubelet says:", status)
	if !status.PluginRegistered {
		r.refused <- status.Error
	}
	return &registration.RegistrationStatusResponse{}, nil
}

func main() {
	csiAddress := flag.String("csi-address", "/run/csi/socket", "socket of the driver")
	endpoint := flag.String("kubelet-registration-path", "", "socket of the driver as kubelet sees it")
	folder := flag.String("plugin-registration-path", "/registration", "kubelet's folder of registrations")
	flag.Bool("leader-election", false, "accepted")
	flag.Int("v", 0, "accepted")
	flag.Duration("timeout", time.Second, "accepted")
	flag.String("http-endpoint", "", "accepted")
	flag.Parse()
	if err := register(*csiAddress, *endpoint, *folder); err != nil {
		fmt.Fprintln(os.Stderr, "csi-node-driver-registrar:", err)
		os.Exit(1)
	}
}

func register(csiAddress, endpoint, folder string) error {
	name, err := driverName(csiAddress)
	if err != nil {
		return err
	}
	socket := filepath.Join(folder, name+"-reg.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	syscall.Umask(0o077)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	ours := &registrar{name: name, endpoint: endpoint, refused: make(chan string, 1)}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, ours)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	go func() { _ = server.Serve(listener) }()
	defer os.Remove(socket)
	select {
	case <-ended:
		return nil
	case reason := <-ours.refused:
		return errors.New(reason)
	}
}

// driverName asks the driver until it answers: it may start after us.
func driverName(csiAddress string) (string, error) {
	connection, err := grpc.NewClient("unix://"+csiAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	answer, err := csi.NewIdentityClient(connection).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return "", err
	}
	return answer.Name, nil
}
