"""The accuracy of convlora's methods and of the alternatives on real images, under equal treatment."""
